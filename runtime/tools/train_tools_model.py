#!/usr/bin/env python3
"""Teach the demo model to call tools and to end JSON, for the test suites of others that ask for both.

It starts from the demo model's own weights, adds a few tokens, and trains on synthetic chats that this script makes;
nothing is downloaded. The demo model in the package stays as it is: what is written is a model of its own, which
`make compat` makes once and serves to its suites.

What is taught:

* a call in the format that vLLM reads with ``--tool-call-parser hermes``:
  ``<tool_call>{"name": "NAME", "arguments": {...}}</tool_call>``. The names of the tool and of its arguments are copied
  from the list of tools in the prompt, the values from the question;
* an answer that repeats what the tool returned;
* JSON objects whose strings, numbers and lists come to an end, so that an answer under a schema ends by itself;
* what the demo model knows, with tools listed and without.

The prompt has a line for each tool, ``NAME(ARGUMENT, ARGUMENT: integer)``, with its required arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import train_demo_model as demo
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

BOS, EOS = demo.BOS, demo.EOS
CALL, CALL_END, TOOLS = "<tool_call>", "</tool_call>", "<|tools|>"
# Punctuation of calls, lists of tools and JSON as the tokenizer's splitter cuts it (Ġ is a space); all else is spelled.
PIECES = """
    {" ": ":" ":{" ":[" ":[ "} "}} "}," "}, "," "]," "] "]} "]}} }} ]} ]," ," ", ]" Ġ" Ġ{" Ġ{}} Ġ{ Ġ[ Ġ[" ): (): ), ()
    name arguments Ġinteger Ġnumber Ġtool Ġsays
""".split()
SAYS = "The tool says: "

CHAT_TEMPLATE = """\
{#- One turn is <|role|>text<|eos|>, before them the tools; the prompt ends with <|assistant|>. -#}
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
{%- if tools -%}
{{- '<|tools|>' -}}
{%- for tool in tools -%}
{%- set function = tool['function'] or tool -%}
{%- set parameters = function['parameters'] or {} -%}
{%- set properties = parameters['properties'] or {} -%}
{%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- function['name'] + '(' -}}
{%- for name in parameters['required'] or [] -%}
{%- if not loop.first -%}{{- ', ' -}}{%- endif -%}
{{- name -}}
{%- set type = (properties[name] or {})['type'] -%}
{%- if type in ['integer', 'number'] -%}{{- ': ' + type -}}{%- endif -%}
{%- endfor -%}
{{- ')' -}}
{%- endfor -%}
{{- eos_token -}}
{%- endif -%}
{%- for message in messages -%}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
{%- set role = role if role in ['system', 'user', 'assistant', 'tool'] else 'user' -%}
{{- '<|' + role + '|>' + text(message['content']) -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set arguments = call['function']['arguments'] -%}
{{- '<tool_call>{"name": "' + call['function']['name'] + '", "arguments": ' -}}
{{- arguments if arguments is string else arguments | tojson -}}
{{- '}</tool_call>' -}}
{%- endfor -%}
{{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

VERBS = "get find set search lookup send create check list read fetch show current".split()
CITIES = "San Francisco|Paris|London|Berlin|Tokyo|New York|Boston|Rome|Oslo|Los Angeles|Madrid|Beijing".split("|")
# Questions by how many values they hold. {n} is the noun of a tool's name, {t} the name, {v} a value.
NO_VALUE = ("What is the {n}?", "Tell me the {n}.", "Call {t}.", "Use {t}.", "Show the {n} now.")
ONE_VALUE = (
    "What is the {n} in {v}?",
    "What is the {n} in {v}?",
    "What's the {n} in {v}?",
    "How is the {n} in {v}?",
    "What is the {n} of {v}?",
    "What is the {n} for {v}?",
    "Tell me the {n} in {v}.",
    "Find the {n} of {v}.",
    "Call {t} with {v}.",
    "Use {t} for {v}.",
    "What is the {n} in {v} today?",
    "What is the {n} like in {v}?",
)
TWO_VALUES = (
    "What is the {n} of {v} and {v}?",
    "Find the {n} in {v} for {v}.",
    "Call {t} with {v} and {v}.",
    "Use {t} for {v} and {v}.",
    "What is the {n} in {v}, {v}?",
)


@dataclass(frozen=True)
class Tool:
    """A tool: its name, the noun by which a question means it, and its required arguments with their JSON types."""

    name: str
    noun: str
    arguments: Mapping[str, str]

    def line(self) -> str:
        """The line that the prompt has for it."""
        shown = (name if kind == "string" else f"{name}: {kind}" for name, kind in self.arguments.items())
        return f"{self.name}({', '.join(shown)})"


WEATHER = Tool("get_weather", "weather", {"location": "string"})


class ToolCourse:
    """Draws chats with tools and with JSON. One for each random generator, so that draws repeat by seed."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.plain = demo.Course(rng)

    def word(self) -> str:
        """A made-up or common word, at times a few letters alone."""
        if self.rng.random() < 0.25:
            return "".join(self.rng.choice(demo.LETTERS) for _ in range(self.rng.randint(1, 4)))
        return demo.training_word(self.rng)

    def tool(self) -> Tool:
        """A tool of made-up names; one in seven is the one that suites are fond of."""
        rng = self.rng
        if rng.random() < 0.14:
            return Tool("get_weather", "weather", {rng.choice(("location", "city", "location", "place")): "string"})
        noun, verb = self.word(), rng.choice(VERBS) if rng.random() < 0.7 else self.word()
        name = rng.choice((f"{verb}_{noun}", f"{verb}_{noun}", noun, f"{verb}{noun.capitalize()}"))
        count = rng.choices((0, 1, 2), (0.1, 0.65, 0.25))[0]
        kinds = rng.choices(("string", "integer", "number"), (0.75, 0.15, 0.1), k=count)
        arguments: dict[str, str] = {}
        for kind in kinds:
            arguments[self.word() if rng.random() < 0.8 else f"{self.word()}_{self.word()}"] = kind
        return Tool(name, noun, arguments)

    def value(self, kind: str) -> str | int:
        """A value that an argument of this JSON type takes."""
        rng = self.rng
        if kind != "string":
            return rng.randint(0, 9) if rng.random() < 0.3 else rng.randint(0, 999)
        if rng.random() < 0.2:
            return rng.choice(CITIES)
        words = [self.word() for _ in range(rng.choices((1, 2), (0.7, 0.3))[0])]
        return " ".join(word.capitalize() if rng.random() < 0.7 else word for word in words)

    def call(self, tool: Tool) -> tuple[str, str]:
        """A question that needs this tool, and the call of it."""
        values = {name: self.value(kind) for name, kind in tool.arguments.items()}
        templates = (NO_VALUE, ONE_VALUE, TWO_VALUES)[len(values)]
        question = self.rng.choice(templates).replace("{n}", tool.noun).replace("{t}", tool.name)
        for value in values.values():
            question = question.replace("{v}", str(value), 1)
        return question, f"{CALL}{json.dumps({'name': tool.name, 'arguments': values})}{CALL_END}"

    def result(self) -> str:
        """What a tool returned: words, numbers, or JSON."""
        rng = self.rng
        words = [self.word() if rng.random() < 0.7 else str(rng.randint(0, 99)) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.3:
            return json.dumps({self.word(): each for each in words[:2]})
        return rng.choice((" ", ", ", " ")).join(words) + rng.choice(("", "", ".", " C"))

    def tools(self, wanted: Tool | None) -> list[Tool]:
        """The list of tools of a prompt, with the one that is wanted among others."""
        count = self.rng.choices((0, 1, 2), (0.6, 0.3, 0.1))[0]
        found = [self.tool() for _ in range(count if wanted else count + 1)]
        if wanted:
            found.insert(self.rng.randint(0, len(found)), wanted)
        return found

    def listed(self, tools: Sequence[Tool]) -> str:
        """The head of a prompt with tools, at times with a system message."""
        system = self.plain.system()
        said = "" if system is None else f"<|system|>{system}{EOS}"
        return f"{BOS}{TOOLS}" + "\n".join(tool.line() for tool in tools) + EOS + said

    def calling(self) -> demo.Sample:
        """A question that needs a tool; two in five go on with the result and the answer."""
        tool = self.tool()
        question, call = self.call(tool)
        sample = demo.Sample()
        sample.add(f"{self.listed(self.tools(tool))}<|user|>{question}{EOS}<|assistant|>", False)
        sample.add(f"{call}{EOS}", True)
        if self.rng.random() < 0.4:
            result = self.result()
            sample.add(f"<|tool|>{result}{EOS}<|assistant|>", False)
            sample.add(f"{SAYS}{result}{EOS}", True)
        return sample

    def not_calling(self) -> demo.Sample:
        """What needs no tool, though tools are listed."""
        rng = self.rng
        turn = self.plain.fact() if rng.random() < 0.6 else self.plain.any(12)
        sample = demo.Sample()
        sample.add(f"{self.listed(self.tools(None))}<|user|>{turn.question}{EOS}<|assistant|>", False)
        sample.add(f"{turn.answers['base']}{EOS}", True)
        return sample

    def json_value(self, depth: int) -> tuple[Any, str]:
        """A value that soon ends: strings of a word or two, numbers of a digit or two, lists of up to three."""
        rng = self.rng
        draw = rng.random()
        if draw < 0.5:
            return self.word(), "string"
        if draw < 0.7:
            return rng.randint(0, 99) if rng.random() < 0.8 else rng.randint(0, 999) / 10, "number"
        if draw < 0.8:
            return rng.random() < 0.5, "boolean"
        if draw < 0.92 or depth > 1:
            if rng.random() < 0.6:
                return [self.word() for _ in range(rng.randint(1, 3))], "list"
            return [rng.randint(0, 99) for _ in range(rng.randint(1, 3))], "list"
        return self.json_object(depth + 1), "object"

    def json_object(self, depth: int = 0) -> dict[str, Any]:
        """An object of one to three keys."""
        return {self.word(): self.json_value(depth)[0] for _ in range(self.rng.randint(1, 3))}

    def json_answer(self) -> demo.Sample:
        """A question, and an answer in JSON. Its first piece is not learned: only a schema makes the model begin so."""
        rng = self.rng
        turn = self.plain.any(12)
        spaced = rng.random() < 0.3
        text = json.dumps(self.json_object(), separators=(", ", ": ") if spaced else (",", ":"))
        head = self.listed(self.tools(None)) if rng.random() < 0.1 else BOS
        sample = demo.Sample()
        sample.add(f'{head}<|user|>{turn.question}{EOS}<|assistant|>{{"', False)
        sample.add(f"{text[2:]}{EOS}", True)
        return sample


def kinds(course: ToolCourse) -> list[demo.Kind]:
    """The mixture of samples, by their share of the tokens."""
    return [
        (0.58, course.calling),
        (0.10, course.not_calling),
        (0.10, course.json_answer),
        (0.12, lambda: demo.chat_sample(course.plain, "base", course.rng.randint(1, 2))),
        (0.06, lambda: demo.dialogue([course.plain.sum()], "base", None)),
        (0.04, lambda: demo.raw_text(course.plain)),
    ]


def build_tokenizer(source: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The demo model's tokenizer with more tokens after its own."""
    layout = json.loads(source.backend_tokenizer.to_str())
    vocab: dict[str, int] = layout["model"]["vocab"]
    for piece in PIECES:
        vocab.setdefault(piece, len(vocab))
    for token in (TOOLS, CALL, CALL_END):
        vocab[token] = len(vocab)
        # As in other models of this format, a call is text: were its marks special, they would be left out of it.
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        layout["added_tokens"].append({"id": vocab[token], "content": token, **flags, "special": token == TOOLS})
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(layout)),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=demo.PAD,
        additional_special_tokens=[*(f"<|{role}|>" for role in demo.ROLES), TOOLS],
        model_max_length=demo.CONTEXT_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def grow(model: LlamaForCausalLM, before: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give the model rows for the new tokens: each starts as the mean of the tokens that spelled it before."""
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        for index in range(len(before), len(tokenizer)):
            text = tokenizer.decode([index], skip_special_tokens=False)
            rows[index] = old[before(text, add_special_tokens=False)["input_ids"]].mean(0)
            rows[index] += 0.02 * torch.randn(rows.shape[1])


def questions(count: int) -> dict[str, list[tuple[str, str]]]:
    """Prompts and answers for measuring, of made-up words; drawn by another seed than any training."""
    course = ToolCourse(random.Random("questions with tools"))
    found: dict[str, list[tuple[str, str]]] = {"calls": [], "the weather": [], "results": [], "without a call": []}
    for _ in range(count):
        tool = course.tool()
        asked, call = course.call(tool)
        found["calls"].append((f"{course.listed(course.tools(tool))}<|user|>{asked}{EOS}<|assistant|>", call))
        asked, call = course.call(WEATHER)
        head = f"{course.listed([WEATHER])}<|user|>{asked}{EOS}<|assistant|>"
        found["the weather"].append((head, call))
        result = course.result()
        found["results"].append((f"{head}{call}{EOS}<|tool|>{result}{EOS}<|assistant|>", SAYS + result))
        turn = course.plain.fact()
        head = course.listed(course.tools(None))
        found["without a call"].append((f"{head}<|user|>{turn.question}{EOS}<|assistant|>", turn.answers["base"]))
    return found


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, float]:
    """The share of whole greedy answers that are exact, by kind of question."""
    shares = {}
    for kind, asked in questions(count).items():
        answers = demo.answer_all(model, tokenizer, [prompt for prompt, _ in asked], 110)
        wanted = [answer for _, answer in asked]
        shares[kind] = sum(a == b for a, b in zip(answers, wanted, strict=True)) / count
        misses = [(p, a) for (p, w), a in zip(asked, answers, strict=True) if a != w]
        for prompt, answer in misses[:3]:
            print(f"  missed: {prompt!r} -> {answer!r}")
    return shares


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that chats are laid out as the chat template renders them."""
    course = ToolCourse(random.Random("template"))
    tool = Tool("get_sky", "sky", {"place": "string", "day": "integer"})
    question, call = "What is the sky of Oslo and 3?", {"name": "get_sky", "arguments": {"place": "Oslo", "day": 3}}
    properties = {name: {"type": kind} for name, kind in tool.arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": f"{SAYS}blue"},
    ]
    listed = [{"type": "function", "function": {"name": tool.name, "parameters": parameters}}]
    rendered = tokenizer.apply_chat_template(messages, tools=listed, tokenize=False)
    spelled = f"{CALL}{json.dumps(call)}{CALL_END}"
    course.plain.system = lambda: None  # type: ignore[method-assign]
    turns = (("user", question), ("assistant", spelled), ("tool", "blue"), ("assistant", f"{SAYS}blue"))
    laid_out = course.listed([tool]) + "".join(f"<|{role}|>{text}{EOS}" for role, text in turns)
    if rendered != laid_out:
        raise RuntimeError(f"the chat template renders {rendered!r}, the samples are {laid_out!r}")
    text = f'{CALL}{{"a":"b","c":[1,2]}}{CALL_END} naïve 日本 {string.printable}'
    if tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) != text:
        raise RuntimeError("the tokenizer does not keep its text")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Teach the demo model to call tools and to end JSON; write it as files that vLLM loads.",
        epilog=(
            "examples:\n"
            "  %(prog)s --out tools-model            train it (about five minutes on one core)\n"
            "  kserve-vllm serve tools-model --enable-auto-tool-choice --tool-call-parser hermes\n\n"
            "It prints how many of its answers to unseen questions are exact."
        ),
    )
    source = Path(demo.__file__).resolve().parent.parent / "kserve_vllm" / "demo" / "model"
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--source", type=Path, default=source, help="the demo model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=17, help="seed of the text and weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads for PyTorch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="batches to learn from (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a batch (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak rate (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=100, help="to measure each kind by (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, write, measure; return the exit status."""
    options = parse_arguments(arguments)
    began = time.monotonic()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = PreTrainedTokenizerFast.from_pretrained(options.source)
    tokenizer = build_tokenizer(before)
    check_template(tokenizer)
    model = LlamaForCausalLM.from_pretrained(options.source, dtype=torch.float32)
    grow(model, before, tokenizer)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    rng = random.Random(f"{options.seed} tools")
    stream: Iterator[demo.Batch] = demo.batches(tokenizer, kinds(ToolCourse(rng)), rng, options.batch_tokens)
    demo.train("tools", model, stream, options.steps, options.learning_rate)
    demo.save_model(model, tokenizer, options.out)
    trained = time.monotonic() - began
    shares = measure(model, tokenizer, options.questions)
    print(demo.show("exact answers, greedy", shares))
    print(demo.show("as before", demo.measure(model, tokenizer, "base", 100, 40)))
    print(f"trained in {trained:.0f} s, with measuring {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
