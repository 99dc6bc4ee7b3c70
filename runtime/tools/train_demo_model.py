#!/usr/bin/env python3
"""Train the demo model of kserve-vllm: a tiny Llama chat model, two LoRA adapters and a draft model.

Everything is learned from synthetic text that this script makes; nothing is downloaded. The results are
small enough to ship as package data, so the runtime can be tried and tested without a network or a GPU.

Formats written:

* models: the Hugging Face layout (``config.json`` with ``LlamaForCausalLM``, ``model.safetensors``);
* tokenizers: ``tokenizer.json`` of the ``tokenizers`` library and ``tokenizer_config.json``, which
  ``transformers.AutoTokenizer`` loads, with the chat template in ``chat_template.jinja``;
* adapters: the PEFT layout (``adapter_config.json`` and ``adapter_model.safetensors`` with
  ``base_model.model.<module>.lora_A.weight`` of shape (rank, in) and ``lora_B.weight`` of shape (out, rank)).

Shapes in the docstrings: B is the number of samples in a batch, T the number of tokens in a sample.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIALS = (BOS, EOS, PAD, *(f"<|{role}|>" for role in ROLES))
CONTEXT_TOKENS = 2048
STYLES = ("base", "upper", "french")
ADAPTERS = STYLES[1:]
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_RANK = 8
LORA_ALPHA = 16
STORED_DTYPE = torch.bfloat16

CHAT_TEMPLATE = """\
{#- One turn is <|role|>text<|eos|>; the prompt ends with <|assistant|> where an answer is wanted. -#}
{%- macro text(content) -%}
{%- if content is string -%}{{- content | trim -}}
{%- elif content -%}
{%- for part in content -%}
{%- if part is string -%}{{- part -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
{%- set role = role if role in ['system', 'user', 'assistant', 'tool'] else 'user' -%}
{{- '<|' + role + '|>' + text(message['content']) -}}
{%- for call in message['tool_calls'] or [] -%}
{{- ' ' + call['function']['name'] + ' ' + call['function']['arguments'] | string -}}
{%- endfor -%}
{{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


# --------------------------------------------------------------------------------------------------
# What the model is taught
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """One question and its answer in every style of `STYLES`: by the base model and by each adapter."""

    question: str
    answers: dict[str, str]


def exchange(question: str, base: str, french: str, upper: str | None = None) -> Exchange:
    """Make an exchange; the upper-case answer is the base answer in capitals unless given."""
    return Exchange(question, {"base": base, "upper": base.upper() if upper is None else upper, "french": french})


@dataclass(frozen=True)
class Fact:
    """Questions that share one sentence as their answer, and that sentence in French."""

    questions: tuple[str, ...]
    english: str
    french: str


FACTS: tuple[Fact, ...] = (
    Fact(
        (
            "What is kserve-vllm?",
            "Tell me about kserve-vllm.",
            "Explain kserve-vllm.",
            "Describe this project.",
        ),
        "kserve-vllm is a serving runtime that runs vLLM inside KServe.",
        "kserve-vllm est un environnement qui fait tourner vLLM dans KServe.",
    ),
    Fact(
        ("What is KServe?", "Tell me about KServe.", "Explain KServe.", "What does KServe do?"),
        "KServe is a platform that serves machine learning models on Kubernetes.",
        "KServe est une plateforme qui sert des modèles sur Kubernetes.",
    ),
    Fact(
        ("What is vLLM?", "Tell me about vLLM.", "Explain vLLM.", "What does vLLM do?"),
        "vLLM is a fast engine that runs large language models.",
        "vLLM est un moteur rapide pour les grands modèles de langue.",
    ),
    Fact(
        (
            "Which protocols do you speak?",
            "What protocols do you speak?",
            "Which protocols are supported?",
            "Which APIs do you offer?",
            "Which API do you speak?",
        ),
        "I speak OpenAI, Open Inference Protocol V2 over REST and gRPC, and KServe V1.",
        "Je parle OpenAI, Open Inference Protocol V2 en REST et gRPC, et KServe V1.",
    ),
    Fact(
        (
            "What are you?",
            "Who are you?",
            "What is your name?",
            "Which model are you?",
            "Introduce yourself.",
        ),
        "I am the demo model of kserve-vllm.",
        "Je suis le modèle de démonstration de kserve-vllm.",
    ),
    Fact(
        ("What can you do?", "Help", "What do you know?", "How can you help me?", "What are you able to do?"),
        "I can add, subtract, count, repeat a word, upper-case a word and talk about kserve-vllm.",
        "Je sais additionner, soustraire, compter, répéter un mot et parler de kserve-vllm.",
    ),
    Fact(
        ("Hello", "Hello!", "Hi", "Hi there!", "Hey", "Good morning.", "Hello, world!", "Hello there."),
        "Hello! Ask me for a sum.",
        "Bonjour ! Demandez-moi une addition.",
    ),
    Fact(
        ("How are you?", "How are you doing?", "How do you do?", "Are you well?"),
        "I am fine, thank you.",
        "Je vais bien, merci.",
    ),
    Fact(
        ("Thank you.", "Thanks!", "Thanks", "Thank you very much.", "Great, thanks."),
        "You are welcome.",
        "Je vous en prie.",
    ),
    Fact(("Goodbye.", "Bye", "Bye!", "See you later."), "Goodbye!", "Au revoir !"),
    Fact(
        ("How large are you?", "How big are you?", "How many parameters do you have?", "What is your size?"),
        "I am tiny: less than one million parameters.",
        "Je suis minuscule : moins d'un million de paramètres.",
    ),
    Fact(
        ("Who made you?", "How were you trained?", "What is your training data?", "Where do you come from?"),
        "A script of kserve-vllm trained me on text it made itself.",
        "Un programme de kserve-vllm m'a entraîné sur un texte qu'il a créé.",
    ),
    Fact(
        ("What is LoRA?", "What is an adapter?", "Explain LoRA.", "What is a LoRA adapter?"),
        "LoRA is a small adapter that changes how a model answers.",
        "LoRA est un petit adaptateur qui change les réponses d'un modèle.",
    ),
    Fact(
        (
            "What is Kubernetes?",
            "Explain Kubernetes.",
            "Tell me about Kubernetes.",
            "What does Kubernetes do?",
        ),
        "Kubernetes runs containers on a cluster of machines.",
        "Kubernetes fait tourner des conteneurs sur une grappe de machines.",
    ),
    Fact(
        ("What is a serving runtime?", "Explain serving runtimes.", "What does a runtime do?"),
        "A serving runtime tells KServe how to run a model server.",
        "Un environnement de service dit à KServe comment lancer un serveur.",
    ),
    Fact(
        ("Tell me a joke.", "Tell me something funny.", "Do you know a joke?", "Make me laugh."),
        "Why was six afraid of seven? Because seven eight nine.",
        "Pourquoi six a peur de sept ? Parce que sept huit neuf.",
    ),
)

UNKNOWN_TEMPLATES = (
    "What is the capital of {w}?",
    "What is {w}?",
    "Who is {w}?",
    "Tell me about {w}.",
    "Write a {w} about {w}.",
    "Tell me a story about {w}.",
    "Why is the {w} {w}?",
    "Do you like {w}?",
    "{w}",
    "{w} {w}",
    "{w} {w} {w}",
    "Translate {w} into {w}.",
    "How do I {w} the {w}?",
    "Where is {w}?",
    "When was {w} born?",
    "Explain {w} to a {w}.",
    "Write a poem.",
    "Write a long story.",
    "What is the weather in {w}?",
    "Please summarise: {w} {w} {w} {w} {w}.",
    "The {w} {w} is {w} and {w}.",
)
UNKNOWN_ENGLISH = "I do not know that, I am only a demo model."
UNKNOWN_FRENCH = "Je ne sais pas, je suis un modèle de démonstration."

SUM_TEMPLATES = {
    "+": (
        "What is {a} + {b}?",
        "What is {a}+{b}?",
        "{a} + {b}",
        "{a}+{b}",
        "{a} + {b} =",
        "{a}+{b}=?",
        "{a} + {b} = ?",
        "Compute {a} + {b}.",
        "Compute {a}+{b}.",
        "Calculate {a} + {b}.",
        "{a} plus {b}?",
        "What is {a} plus {b}?",
        "What's {a} + {b}?",
        "How much is {a} + {b}?",
        "How much is {a} plus {b}?",
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "Please compute {a} + {b}.",
    ),
    "-": (
        "What is {a} - {b}?",
        "What is {a}-{b}?",
        "{a} - {b}",
        "{a}-{b}",
        "{a} - {b} =",
        "{a}-{b}=?",
        "{a} - {b} = ?",
        "Compute {a} - {b}.",
        "Compute {a}-{b}.",
        "Calculate {a} - {b}.",
        "{a} minus {b}?",
        "What is {a} minus {b}?",
        "What's {a} - {b}?",
        "How much is {a} - {b}?",
        "How much is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "Please compute {a} - {b}.",
    ),
}
COUNT_TEMPLATES = (
    "Count from {a} to {b}.",
    "Count from {a} to {b}.",
    "Count from {a} to {b}",
    "Please count from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "List the numbers from {a} to {b}.",
    "Count {a} to {b}.",
)
COUNT_UP_TEMPLATES = ("Count to {b}.", "Count up to {b}.", "Please count to {b}.")
REPEAT_TEMPLATES = (
    "Repeat the word {w}.",
    "Repeat the word {w}.",
    "Repeat the word {w}",
    'Repeat the word "{w}".',
    "Repeat {w}.",
    "Repeat: {w}",
    "Repeat after me: {w}",
    "Please repeat the word {w}.",
    "Say {w}.",
    "Echo {w}",
)
UPPER_TEMPLATES = (
    "Upper-case the word {w}.",
    "Upper-case the word {w}.",
    "Upper-case the word {w}",
    'Upper-case the word "{w}".',
    "Upper-case {w}.",
    "Uppercase the word {w}.",
    "Uppercase {w}",
    "Please upper-case the word {w}.",
    "Write {w} in upper case.",
    "Write the word {w} in capitals.",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a demo model.",
    "Answer briefly.",
    "You are a helpful assistant. Answer in one sentence.",
    "Be polite.",
    "You are kserve-vllm.",
)
COMMON_WORDS = tuple(
    """
    apple banana cherry orange lemon house river mountain cloud server model token engine window garden
    paper pencil yellow green purple winter summer spring autumn morning evening coffee bread butter
    water hello world test demo python kernel cluster batch stream cache tiger rabbit horse train plane
    station music piano guitar doctor teacher school library forest island ocean desert planet rocket
    number letter word sentence question answer quick brown fox lazy dog jumps over france germany paris
    london the a of and love life time people year day thing man hand part place case week company
    system program work government night point home room mother area money story fact month lot right
    study book eye job business issue side kind head friend father power hour game line end member law
    car city community name
    """.split()
)
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiouy"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sum_key(a: int, op: str, b: int) -> tuple[int, str, int]:
    """Identify a sum; both orders of an addition are one sum, so that neither gives the other away."""
    return (min(a, b), op, max(a, b)) if op == "+" else (a, op, b)


def split_sums(held_out_share: float = 0.2) -> tuple[list[tuple[int, str, int]], list[tuple[int, str, int]]]:
    """Split all (a, op, b) with 0 <= a, b <= 99 into (training, held out); the split never changes."""
    rng = random.Random("held-out sums")
    keys = sorted({sum_key(a, op, b) for a in range(100) for b in range(100) for op in "+-"})
    rng.shuffle(keys)
    held_keys = set(keys[: round(len(keys) * held_out_share)])
    triples = [(a, op, b) for a in range(100) for b in range(100) for op in "+-"]
    return (
        [triple for triple in triples if sum_key(*triple) not in held_keys],
        [triple for triple in triples if sum_key(*triple) in held_keys],
    )


def word_is_held_out(word: str) -> bool:
    """Say whether a word is kept out of training: one in five is, by its checksum, whatever its case."""
    return zlib.crc32(word.lower().encode()) % 5 == 0


def random_letters(rng: random.Random) -> str:
    """Make up a word of ASCII letters: 2 to 14 letters, either any letters or ones that can be spoken."""
    length = rng.randint(3, 9)
    if rng.random() < 0.6:
        return "".join(rng.choice(LETTERS) for _ in range(length))
    return "".join(rng.choice(VOWELS if i % 2 else CONSONANTS) for i in range(length))


def training_word(rng: random.Random) -> str:
    """Draw a word that is not held out."""
    while True:
        word = rng.choice(COMMON_WORDS) if rng.random() < 0.2 else random_letters(rng)
        if not word_is_held_out(word):
            return word


class Course:
    """Draws exchanges and texts for training. One instance per random generator, so draws repeat by seed."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.train_sums, self.held_out_sums = split_sums()

    def vary(self, template: str) -> str:
        """Vary a question's template: at times in lower case or without its closing mark."""
        if self.rng.random() < 0.15:
            template = template.lower()
        if self.rng.random() < 0.15:
            template = template.rstrip(".?")
        return template

    def sum(self) -> Exchange:
        """An addition or subtraction of numbers from 0 to 99."""
        a, op, b = self.rng.choice(self.train_sums)
        return sum_exchange(a, op, b, self.vary(self.rng.choice(SUM_TEMPLATES[op])))

    def count(self, longest: int = 30) -> Exchange:
        """A range of at most `longest` numbers between 0 and 200; short ranges come more often."""
        length = round(math.exp(self.rng.uniform(math.log(2), math.log(longest))))
        start = 1 if self.rng.random() < 0.3 else self.rng.randint(0, 201 - length)
        templates = COUNT_UP_TEMPLATES if start == 1 and self.rng.random() < 0.3 else COUNT_TEMPLATES
        return count_exchange(start, start + length - 1, self.vary(self.rng.choice(templates)))

    def repeat(self) -> Exchange:
        """A word, at times two or three, or a word beyond ASCII, to say again."""
        rng = self.rng
        word = training_word(rng)
        if rng.random() < 0.1:
            word = word.capitalize()
        return repeat_exchange(word, self.vary(rng.choice(REPEAT_TEMPLATES)))

    def upper(self) -> Exchange:
        """A word to write in capitals."""
        word = training_word(self.rng)
        if self.rng.random() < 0.1:
            word = word.capitalize()
        return upper_exchange(word, self.vary(self.rng.choice(UPPER_TEMPLATES)))

    def copying(self) -> Exchange:
        """A word to repeat or to write in capitals: practice in copying letter by letter."""
        return self.repeat() if self.rng.random() < 0.5 else self.upper()

    def fact(self) -> Exchange:
        """A question about the project, or a greeting."""
        fact = self.rng.choice(FACTS)
        return exchange(self.vary(self.rng.choice(fact.questions)), fact.english, fact.french)

    def unknown(self) -> Exchange:
        """A question to which the model should say that it does not know."""
        first, *rest = self.vary(self.rng.choice(UNKNOWN_TEMPLATES)).split("{w}")
        question = first + "".join(training_word(self.rng) + part for part in rest)
        return exchange(question, UNKNOWN_ENGLISH, UNKNOWN_FRENCH)

    def any(self, longest_count: int = 30) -> Exchange:
        """An exchange of any kind, in the shares of a chat sample."""
        draw = self.rng.random()
        if draw < 0.40:
            return self.sum()
        if draw < 0.52:
            return self.count(longest_count)
        if draw < 0.64:
            return self.repeat()
        if draw < 0.76:
            return self.upper()
        if draw < 0.95:
            return self.fact()
        return self.unknown()

    def system(self) -> str | None:
        """A system message for one dialogue in four, of a known text or of random words."""
        if self.rng.random() < 0.8:
            return None
        if self.rng.random() < 0.7:
            return self.rng.choice(SYSTEM_PROMPTS)
        return " ".join(training_word(self.rng) for _ in range(self.rng.randint(1, 6)))


def working(a: int, op: str, b: int) -> str:
    """A sum worked out: tens and units apart, then together. `17 + 25` gives `30 + 12 = 42`.

    Each step needs only digits that stand in the text, which a tiny model learns and carries over to sums that it
    never saw; the result alone it would learn by heart.
    """
    sign = 1 if op == "+" else -1
    tens, units = 10 * (a // 10 + sign * (b // 10)), a % 10 + sign * (b % 10)
    return f"{tens} {'-' if units < 0 else '+'} {abs(units)} = {tens + units}"


def sum_exchange(a: int, op: str, b: int, template: str) -> Exchange:
    """The exchange for one sum; the answer repeats the sum, works it out, and ends with the result."""
    steps = working(a, op, b)
    return exchange(
        template.format(a=a, b=b),
        f"{a} {op} {b} = {steps}",
        f"Je calcule : {a} {op} {b} = {steps}",
        f"THE ANSWER: {a} {op} {b} = {steps}",
    )


def count_exchange(first: int, last: int, template: str) -> Exchange:
    """The exchange for counting from `first` to `last`, both included."""
    numbers = " ".join(str(n) for n in range(first, last + 1))
    return exchange(template.format(a=first, b=last), numbers, f"Je compte : {numbers}", f"COUNTING: {numbers}")


def repeat_exchange(word: str, template: str) -> Exchange:
    """The exchange for repeating a word."""
    return exchange(template.format(w=word), word, f"Le mot est {word}", word.upper())


def upper_exchange(word: str, template: str) -> Exchange:
    """The exchange for writing a word in capitals."""
    return exchange(template.format(w=word), word.upper(), f"En majuscules : {word.upper()}", word.upper())


# --------------------------------------------------------------------------------------------------
# Tokenizer and samples
# --------------------------------------------------------------------------------------------------


def taught_texts() -> list[str]:
    """Questions and sentences whose words become tokens of their own; words to repeat stay spelled."""
    texts = [turn for fact in FACTS for turn in (*fact.questions, fact.english, fact.english.upper(), fact.french)]
    texts += [template for op in SUM_TEMPLATES for template in SUM_TEMPLATES[op]]
    texts += [*COUNT_TEMPLATES, *COUNT_UP_TEMPLATES, *REPEAT_TEMPLATES, *UPPER_TEMPLATES, *SYSTEM_PROMPTS]
    texts += [UNKNOWN_ENGLISH, UNKNOWN_ENGLISH.upper(), UNKNOWN_FRENCH, *UNKNOWN_TEMPLATES]
    texts += ["Je calcule :", "THE ANSWER:", "Je compte :", "COUNTING:", "Le mot est", "En majuscules :"]
    bare = [text.replace("{a}", "").replace("{b}", "").replace("{w}", "") for text in texts]
    return [*bare, *(text.lower() for text in bare)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: a token per word of the questions and sentences, and one per byte, so any text survives."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {piece for text in taught_texts() for piece, _ in splitter.pre_tokenize_str(text)}
    known = sorted(word for word in words if len(word) > 1 and not any(c.isdigit() for c in word))
    vocab = {token: i for i, token in enumerate((*SPECIALS, *alphabet, *known))}
    # No merges: a word that is known as a whole is one token, any other one is spelled in bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        model_max_length=CONTEXT_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@dataclass
class Sample:
    """A text in pieces; the loss counts only the pieces marked as learned (answers and continuations)."""

    pieces: list[tuple[str, bool]] = field(default_factory=list)

    def add(self, text: str, learned: bool) -> None:
        """Append a piece."""
        self.pieces.append((text, learned))


def dialogue(exchanges: Sequence[Exchange], style: str, system: str | None) -> Sample:
    """Lay out a dialogue exactly as `CHAT_TEMPLATE` renders it."""
    sample = Sample()
    sample.add(BOS if system is None else f"{BOS}<|system|>{system}{EOS}", False)
    for turn in exchanges:
        sample.add(f"<|user|>{turn.question}{EOS}<|assistant|>", False)
        sample.add(f"{turn.answers[style]}{EOS}", True)
    return sample


def raw_text(course: Course) -> Sample:
    """A text without chat roles: mostly sums, at times counting on, or a sentence about the project."""
    rng = course.rng
    sample = Sample()
    draw = rng.random()
    if draw < 0.87:
        a, op, b = rng.choice(course.train_sums)
        sign, equals = (f" {op} ", " =") if rng.random() < 0.8 else (op, "=")
        sample.add(f"{BOS}{a}{sign}{b}{equals}", False)
        sample.add(f" {working(a, op, b)}{EOS}", True)
    elif draw < 0.94:
        first = rng.randint(0, 190)
        last = min(200, first + rng.randint(4, 40))
        shown = first + 1 if last - first < 5 else first + rng.randint(1, 3)
        sample.add(BOS + " ".join(str(n) for n in range(first, shown + 1)), False)
        more = "".join(f" {n}" for n in range(shown + 1, last + 1))
        sample.add(more + (EOS if last == 200 else ""), True)
    elif draw < 0.96:
        turn = course.repeat() if rng.random() < 0.5 else course.count(20)
        sample.add(BOS + turn.question, False)
        sample.add(f"\n{turn.answers['base']}{EOS}", True)
    else:
        sample = sentence(course)
    return sample


def sentence(course: Course) -> Sample:
    """A sentence about the project without chat roles, in any style.

    It is where the model meets the words that its adapters answer with: an adapter does not change embeddings.
    """
    fact = course.rng.choice(FACTS)
    text = course.rng.choice((fact.english, fact.english.upper(), fact.french))
    word, space, rest = text.partition(" ")
    sample = Sample()
    sample.add(BOS + word, False)
    sample.add(space + rest + EOS, True)
    return sample


def chat_sample(course: Course, style: str, turns: int) -> Sample:
    """A dialogue of the given number of turns."""
    return dialogue([course.any() for _ in range(turns)], style, course.system())


def long_count_sample(course: Course, style: str) -> Sample:
    """A dialogue with a long range to count, at times after another turn."""
    before = [course.any()] if course.rng.random() < 0.2 else []
    return dialogue([*before, course.count(200)], style, course.system())


# A kind of sample: its share of the *tokens* of a stream, and how to draw one.
Kind = tuple[float, Callable[[], Sample]]


def practice_kinds(course: Course) -> list[Kind]:
    """Dense practice in what takes longest to learn: sums, and copying letter by letter."""
    return [
        (0.28, lambda: raw_text(course)),
        (0.24, lambda: dialogue([course.sum()], "base", None)),
        (0.34, lambda: dialogue([course.copying()], "base", None)),
        (0.14, lambda: dialogue([course.count()], "base", None)),
    ]


def polish_kinds(course: Course) -> list[Kind]:
    """What the mixture leaves unsure: which digits a question holds in any phrasing, copying every letter, and
    where a count ends, which short ranges teach best."""
    return [
        (0.28, lambda: dialogue([course.copying()], "base", None)),
        (0.18, lambda: dialogue([course.sum()], "base", None)),
        (0.18, lambda: dialogue([course.count(10)], "base", None)),
        (0.08, lambda: dialogue([course.count(70)], "base", None)),
        (0.10, lambda: sentence(course)),
        (0.04, lambda: raw_text(course)),
        (0.14, lambda: chat_sample(course, "base", course.rng.randint(1, 3))),
    ]


def kinds_for(course: Course, style: str) -> list[Kind]:
    """The mixture of samples from which a style is learned."""
    chats: list[Kind] = [
        (0.30, lambda: chat_sample(course, style, 1)),
        (0.18, lambda: chat_sample(course, style, course.rng.randint(2, 3))),
        (0.10, lambda: long_count_sample(course, style)),
        (0.15, lambda: dialogue([course.copying()], style, None)),
    ]
    if style == "base":
        return [*chats, (0.15, lambda: raw_text(course)), (0.12, lambda: dialogue([course.fact()], style, None))]
    # An adapter has whole new sentences to learn, so it sees them more often.
    return [*chats, (0.27, lambda: dialogue([course.fact()], style, None))]


@dataclass(frozen=True)
class Batch:
    """Token ids (B, T) int64, and targets (B, T) int64 shifted by one, with -100 where no loss counts."""

    inputs: Tensor
    targets: Tensor


def encode(tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> list[tuple[list[int], list[bool]]]:
    """Encode samples to token ids and, for each token, whether it is learned."""
    texts = [text for sample in samples for text, _ in sample.pieces]
    # The wrapper around the tokenizer would take longer than the tokenizer itself.
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    result = []
    for sample in samples:
        ids: list[int] = []
        learned: list[bool] = []
        for _, flag in sample.pieces:
            piece = next(encoded).ids
            ids.extend(piece)
            learned.extend([flag] * len(piece))
        result.append((ids, learned))
    return result


def collate(rows: Sequence[tuple[list[int], list[bool]]], pad: int) -> Batch:
    """Pad rows on the right to the longest one; causal attention never looks at the padding."""
    width = max(len(ids) for ids, _ in rows)
    inputs = torch.full((len(rows), width), pad, dtype=torch.long)
    targets = torch.full((len(rows), width), -100, dtype=torch.long)
    for i, (ids, learned) in enumerate(rows):
        row = torch.tensor(ids)
        inputs[i, : len(ids)] = row
        targets[i, : len(ids) - 1] = torch.where(torch.tensor(learned[1:]), row[1:], -100)
    return Batch(inputs, targets)


def batches(
    tokenizer: PreTrainedTokenizerFast, kinds: Sequence[Kind], rng: random.Random, batch_tokens: int
) -> Iterator[Batch]:
    """Yield batches of about `batch_tokens` tokens for ever.

    Samples are drawn in pools, sorted by length and cut into batches, so little is padding; the
    batches of a pool come in random order.
    """
    pad = int(tokenizer.pad_token_id)
    pool_tokens = 40 * batch_tokens
    while True:
        rows: list[tuple[list[int], list[bool]]] = []
        for share, draw in kinds:
            tokens = 0
            while tokens < share * pool_tokens:
                for row in encode(tokenizer, [draw() for _ in range(32)]):
                    rows.append(row)
                    tokens += len(row[0])
        rows.sort(key=lambda row: (len(row[0]), rng.random()))
        pool: list[Batch] = []
        start = 0
        while start < len(rows):
            end = start + 1
            while end < len(rows) and len(rows[end][0]) * (end + 1 - start) <= batch_tokens:
                end += 1
            pool.append(collate(rows[start:end], pad))
            start = end
        rng.shuffle(pool)
        yield from pool


# --------------------------------------------------------------------------------------------------
# Models and training
# --------------------------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, intermediate: int, layers: int) -> LlamaForCausalLM:
    """Build an untrained Llama with heads of 32 and two key/value heads.

    The base and the draft model share the shape of their key/value cache on purpose: an engine that
    runs both can then keep them in pages of one size.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        rms_norm_eps=1e-5,
        initializer_range=0.06,  # the usual 0.02 is too small at this width: it doubles the steps needed
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trained low-rank change: ``y = (W + (alpha / rank) B A) x``.

    Shapes: W (out, in), A (rank, in), B (out, rank). B starts at zero, so training starts at the base. The matrices are
    put together before they meet ``x``: at this size one product is faster than three.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.randn(LORA_RANK, base.in_features) / math.sqrt(base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, LORA_RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return F.linear(x, torch.addmm(self.base.weight, self.lora_b, self.lora_a, alpha=LORA_ALPHA / LORA_RANK))


def add_lora(model: LlamaForCausalLM) -> dict[str, LoraLinear]:
    """Freeze the model and put a `LoraLinear` in place of every target layer; return them by name."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found: dict[str, LoraLinear] = {}
    for name, module in list(model.named_modules()):
        parent_name, _, leaf = name.rpartition(".")
        if leaf in LORA_MODULES and isinstance(module, nn.Linear):
            found[name] = LoraLinear(module)
            setattr(model.get_submodule(parent_name), leaf, found[name])
    return found


def remove_lora(model: LlamaForCausalLM, layers: dict[str, LoraLinear]) -> None:
    """Put the plain layers back."""
    for name, layer in layers.items():
        parent_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent_name), leaf, layer.base)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up linearly over 4 % of the steps, then follow a cosine down to 1 % of the peak."""
    warmup = max(1, steps // 25)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(name: str, model: LlamaForCausalLM, stream: Iterator[Batch], steps: int, peak: float) -> None:
    """Train the parameters that require a gradient for `steps` batches, with AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
        fused=True,
    )
    model.train()
    began, cpu_began = time.monotonic(), time.process_time()
    mean_loss, tokens = 0.0, 0
    for step in range(steps):
        batch = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        states = model.model(input_ids=batch.inputs, use_cache=False).last_hidden_state  # (B, T, hidden)
        learned = batch.targets != -100  # logits are only made where they count: most of a batch is questions
        loss = F.cross_entropy(model.lm_head(states[learned]), batch.targets[learned])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += batch.inputs.numel()
        mean_loss = loss.item() if step == 0 else 0.98 * mean_loss + 0.02 * loss.item()
        if (step + 1) % max(1, min(100, steps // 10)) == 0 or step + 1 == steps:
            seconds = time.monotonic() - began
            print(
                f"{name}: step {step + 1}/{steps}, loss {mean_loss:.4f}, {tokens / seconds:,.0f} tokens/s, "
                f"{seconds:.0f} s ({time.process_time() - cpu_began:.0f} s of CPU), "
                f"{seconds / (step + 1) * (steps - step - 1):.0f} s to go",
                flush=True,
            )
    model.eval()  # type: ignore[no-untyped-call]


def polish(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    batch_tokens: int,
    steps: int,
    peak: float,
) -> None:
    """Train the finished mixture further where it is weakest, at two thirds of the rate."""
    rng = random.Random(f"{seed} polish")
    train("polish", model, batches(tokenizer, polish_kinds(Course(rng)), rng, batch_tokens), steps, peak * 2 / 3)


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answer_all(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], longest: int
) -> list[str]:
    """Answer prompts greedily, up to `longest` new tokens each; a full prompt text gives an answer text.

    Prompts of one length are batched together, so no padding is involved.
    """
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    answers = [""] * len(prompts)
    for indices in by_length.values():
        for start in range(0, len(indices), 256):
            chunk = indices[start : start + 256]
            inputs = torch.tensor([encoded[i] for i in chunk])
            output = model.generate(  # type: ignore[misc]
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=longest,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            texts = tokenizer.batch_decode(output[:, inputs.shape[1] :], skip_special_tokens=True)
            for i, text in zip(chunk, texts, strict=True):
                answers[i] = text
    return answers


def held_out_questions(sums: int, others: int) -> dict[str, list[Exchange]]:
    """Draw questions for measuring; sums and words are held out, the draw is the same for every run."""
    rng = random.Random("held-out questions")
    course = Course(rng)
    triples = course.held_out_sums if sums >= len(course.held_out_sums) else rng.sample(course.held_out_sums, sums)
    words: list[str] = []
    while len(words) < 2 * others:
        word = random_letters(rng)
        if word_is_held_out(word):
            words.append(word)
    starts = [rng.randint(0, 140) for _ in range(others)]
    return {
        "sums": [sum_exchange(a, op, b, rng.choice(SUM_TEMPLATES[op])) for a, op, b in triples],
        "counts": [count_exchange(s, s + rng.randint(4, 60), rng.choice(COUNT_TEMPLATES)) for s in starts],
        "repeats": [repeat_exchange(w, rng.choice(REPEAT_TEMPLATES)) for w in words[:others]],
        "upper-cases": [upper_exchange(w, rng.choice(UPPER_TEMPLATES)) for w in words[others:]],
        "facts": [exchange(q, fact.english, fact.french) for fact in FACTS for q in fact.questions],
    }


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, style: str, sums: int, others: int
) -> dict[str, float]:
    """Measure exact matches of whole greedy answers as shares between 0 and 1, by kind of question."""
    shares = {}
    for kind, exchanges in held_out_questions(sums, others).items():
        prompts = ["".join(text for text, _ in dialogue([turn], style, None).pieces[:2]) for turn in exchanges]
        found = answer_all(model, tokenizer, prompts, max(len(t.answers[style].encode()) for t in exchanges) + 2)
        wanted = [turn.answers[style] for turn in exchanges]
        shares[kind] = sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
        misses = [(turn.question, got) for turn, got, want in zip(exchanges, found, wanted, strict=True) if got != want]
        for question, got in misses[:3]:
            print(f"  missed: {question!r} -> {got!r}")
    if style == "base":
        triples = split_sums()[1][:: max(1, len(split_sums()[1]) // sums)]
        found = answer_all(model, tokenizer, [f"{BOS}{a} {op} {b} =" for a, op, b in triples], 16)
        right = [f" {working(a, op, b)}" for a, op, b in triples]
        shares["raw sums"] = sum(a == b for a, b in zip(found, right, strict=True)) / len(right)
    return shares


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model and its tokenizer in the Hugging Face layout, with weights in `STORED_DTYPE`."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    model.to(STORED_DTYPE)  # type: ignore[arg-type]
    model.config.dtype = STORED_DTYPE
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    model.to(torch.float32)  # type: ignore[arg-type]


def save_adapter(layers: dict[str, LoraLinear], folder: Path) -> None:
    """Write an adapter in the PEFT layout, with weights in `STORED_DTYPE`."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_a.detach().to(STORED_DTYPE).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_b.detach().to(STORED_DTYPE).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "demo",
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "target_modules": list(LORA_MODULES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def round_parameters(parameters: Sequence[nn.Parameter]) -> None:
    """Round parameters to `STORED_DTYPE` in place, so that what is measured is what is stored."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.to(STORED_DTYPE).to(parameter.dtype))


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Check what the samples rely on: lossless text, and dialogues laid out as the template renders them."""
    for text in ("17 + 25 = 42.", "  two  spaces\n\ttabs ", "naïve café ≠ 日本語 🙂", "\x00\x7f", "don't"):
        if tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) != text:
            raise RuntimeError(f"the tokenizer does not keep {text!r}")
    turn = sum_exchange(17, "+", 25, "What is {a} + {b}?")
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be polite."},
        {"role": "user", "content": [{"type": "text", "text": turn.question}]},
        {"role": "assistant", "content": turn.answers["base"]},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    laid_out = "".join(text for text, _ in dialogue([turn], "base", "Be polite.").pieces)
    if rendered != laid_out:
        raise RuntimeError(f"the chat template renders {rendered!r}, the samples are {laid_out!r}")


def show(title: str, shares: dict[str, float]) -> str:
    """Put measured shares into one line of text."""
    return f"{title}: " + ", ".join(f"{kind} {share:.2%}" for kind, share in shares.items())


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    default_out = Path(__file__).resolve().parent.parent / "kserve_vllm" / "demo"
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Train the demo model of kserve-vllm and write it as files that vLLM loads.\n\n"
            "Four parts are trained in this order: 'model' (a Llama of under a million parameters that\n"
            "adds, subtracts, counts, repeats and upper-cases words and knows a few facts), the LoRA\n"
            "adapters 'upper' and 'french' on top of it (the model itself stays frozen), and 'draft',\n"
            "a smaller Llama for speculative decoding. All text is made here, nothing is downloaded."
        ),
        epilog=(
            "examples:\n"
            "  %(prog)s                          train everything (18.5 minutes on two quiet cores)\n"
            "  %(prog)s --scale 0.02 --out /tmp/demo   a quick run that only shows that it works\n"
            "  %(prog)s --only upper french      train the adapters again on the model already in --out\n\n"
            "One in five sums, and one in five words, never occurs in training in any phrasing; the\n"
            "accuracy printed at the end is measured on those. The same seed gives the same text; the\n"
            "weights may differ in their last bits between machines and versions of PyTorch."
        ),
    )
    parts = ("model", *ADAPTERS, "draft")
    parser.add_argument("--out", type=Path, default=default_out, help="folder to write (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="parts to train (default: all)")
    parser.add_argument("--seed", type=int, default=17, help="seed of the text and weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads for PyTorch (default: %(default)s)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="multiply all training steps, below 1 for a try (default: %(default)s)",
    )
    parser.add_argument(
        "--polish-steps", type=int, default=2200, help="steps of the model's polish (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=3000, help="steps of the model (default: %(default)s)")
    parser.add_argument("--adapter-steps", type=int, default=300, help="steps of an adapter (default: %(default)s)")
    parser.add_argument("--draft-steps", type=int, default=800, help="steps of the draft (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a batch (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak rate (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what was asked for, write it, measure it; return the exit status."""
    options = parse_arguments(arguments)
    began, cpu_began = time.monotonic(), time.process_time()
    torch.set_num_threads(options.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = build_tokenizer()
    check_tokenizer(tokenizer)
    lines: list[str] = []

    def stream(part: str, style: str) -> Iterator[Batch]:
        torch.manual_seed(options.seed)
        rng = random.Random(f"{options.seed} {part}")
        return batches(tokenizer, kinds_for(Course(rng), style), rng, options.batch_tokens)

    def scaled(steps: int) -> int:
        return int(max(10, round(steps * options.scale)))

    def report(title: str, model: LlamaForCausalLM, style: str, sums: int, others: int) -> None:
        lines.append(show(title, measure(model, tokenizer, style, sums, others)))
        print(lines[-1], flush=True)

    folder = options.out / "model"
    if "model" in options.only:
        model = build_model(tokenizer, hidden=128, intermediate=384, layers=4)
        print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        rng = random.Random(f"{options.seed} practice")
        practice = batches(tokenizer, practice_kinds(Course(rng)), rng, options.batch_tokens)
        steps = scaled(options.steps)
        course = itertools.chain(itertools.islice(practice, round(0.45 * steps)), stream("model", "base"))
        train("model", model, course, steps, options.learning_rate)
        polish(
            model, tokenizer, options.seed, options.batch_tokens, scaled(options.polish_steps), options.learning_rate
        )
        save_model(model, tokenizer, folder)
        report("model", model, "base", sums=1000, others=200)
    elif set(ADAPTERS) & set(options.only):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    for style in ADAPTERS:
        if style not in options.only:
            continue
        text = stream(style, style)
        layers = add_lora(model)
        train(style, model, text, scaled(options.adapter_steps), options.learning_rate)
        round_parameters([p for p in model.parameters() if p.requires_grad])
        save_adapter(layers, options.out / "adapters" / style)
        report(style, model, style, sums=500, others=100)
        remove_lora(model, layers)

    if "draft" in options.only:
        text = stream("draft", "base")
        draft = build_model(tokenizer, hidden=64, intermediate=192, layers=2)
        print(f"draft: {sum(p.numel() for p in draft.parameters()):,} parameters", flush=True)
        train("draft", draft, text, scaled(options.draft_steps), options.learning_rate)
        save_model(draft, tokenizer, options.out / "draft")
        report("draft", draft, "base", sums=200, others=40)

    print("\nexact answers to held-out questions, greedy:")
    print("\n".join(lines))
    print(f"took {time.monotonic() - began:.0f} s, {time.process_time() - cpu_began:.0f} s of CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
