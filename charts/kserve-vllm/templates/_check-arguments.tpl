{{/* Name of a flag, in vLLM's long spelling: --max_num_seqs=4, -tp=4 and --no-x are --max-num-seqs, --tensor-parallel-size, --x. */}}
{{- define "kserve-vllm.flag" -}}
{{- $short := dict "-tp" "tensor-parallel-size" "-pp" "pipeline-parallel-size" "-dp" "data-parallel-size" "-pcp" "prefill-context-parallel-size" "-dpn" "data-parallel-rank" "-dpr" "data-parallel-start-rank" "-dpl" "data-parallel-size-local" "-dpa" "data-parallel-address" "-dpp" "data-parallel-rpc-port" "-dpb" "data-parallel-backend" "-dph" "data-parallel-hybrid-lb" "-dpe" "data-parallel-external-lb" "-dpm" "data-parallel-multi-port-external-lb" "-n" "nnodes" "-r" "node-rank" "-q" "quantization" "-sc" "speculative-config" "-asc" "api-server-count" -}}
{{- $word := regexReplaceAll "[=. ].*" . "" -}}
{{- if hasPrefix "--" $word -}}
{{- $word | trimPrefix "--" | replace "_" "-" | trimPrefix "no-" -}}
{{- else if hasKey $short $word -}}
{{- index $short $word -}}
{{- else if regexMatch "^-[nrq]." $word -}}
{{/* A flag of one letter may have its value attached: -n2. */}}
{{- index $short (trunc 2 $word) -}}
{{- end -}}
{{- end }}

{{/* Not empty for a flag that lays the model over GPUs, of which the chart has to know. */}}
{{- define "kserve-vllm.parallelFlag" -}}
{{- if regexMatch "^((tensor|pipeline)-parallel-size|prefill-context-parallel-size|data-parallel-.*|nnodes|node-rank|master-(addr|port)|distributed-executor-backend)$" . }}yes{{ end -}}
{{- end }}

{{/* Of extra arguments and environment. */}}
{{- define "kserve-vllm.check.arguments" -}}
{{- $at := .at -}}
{{- $s := .s -}}
{{- $owned := dict "model" "model" "model-id" "model" "model-name" "servedNames" "model-dir" "storageUri" "served-model-name" "servedNames" "demo" "demo" "profile" "profile" "tensor-parallel-size" "parallelism.tensor" "pipeline-parallel-size" "parallelism.pipeline" "data-parallel-size" "parallelism.data" "max-num-seqs" "maxNumSeqs" "max-model-len" "maxModelLen" "quantization" "quantization" "speculative-config" "speculative" "enable-lora" "lora.adapters" "lora-modules" "lora.adapters" "max-loras" "lora.maxLoras" "max-lora-rank" "lora.maxRank" "chat-template" "chatTemplate" "keys-file" "apiKeys" "redis-url" "redis" "adapters-file" "lora.watched" "warmup-file" "warmup" "moderation-file" "moderation" "drain-timeout" "drain.timeoutSeconds" "drain-delay" "drain.delaySeconds" "runner" "task" "api-server-count" "apiServerCount" "response-cache" "responseCache" "usage-sink" "usageSink" "otlp-endpoint" "tracing.endpoint" "trace-sample-ratio" "tracing.sampleRatio" -}}
{{- $fixed := list "host" "http-port" "grpc-port" "port" "headless" "config" "ssl-certfile" "ssl-keyfile" -}}
{{- range $s.extraArgs }}
{{- $flag := include "kserve-vllm.flag" . }}
{{- if hasKey $owned $flag }}
{{ printf "%s: extraArgs has --%s; set %s instead, other values are derived from it." $at $flag (index $owned $flag) }}
{{- else if include "kserve-vllm.parallelFlag" $flag }}
{{ printf "%s: extraArgs has --%s; set parallelism or multiNode instead, GPUs are counted by them." $at $flag }}
{{- else if has $flag $fixed }}
{{ printf "%s: extraArgs has --%s, which probes, ports and Services of the chart rely on." $at $flag }}
{{- end }}
{{- end }}
{{- range $s.env }}
{{- $flag := "" }}
{{- if hasPrefix "KSERVE_VLLM_" .name }}{{ $flag = trimPrefix "KSERVE_VLLM_" .name | lower | replace "_" "-" }}{{ end }}
{{- if eq .name "KSERVE_TLS_CERT_FILE" }}{{ $flag = "ssl-certfile" }}{{ end }}
{{- if and (hasKey $owned $flag) (ne $flag "redis-url") }}
{{ printf "%s: %s in env is --%s; set %s instead, other values are derived from it." $at .name $flag (index $owned $flag) }}
{{- else if or (include "kserve-vllm.parallelFlag" $flag) (has $flag $fixed) }}
{{ printf "%s: %s in env is --%s, which GPUs, probes and ports of the chart rely on." $at .name $flag }}
{{- end }}
{{- end }}
{{- end }}

{{/* Of one word that was meant to be two. Takes (list at name words). */}}
{{- define "kserve-vllm.check.words" -}}
{{- range index . 2 }}
{{- $word := include "kserve-vllm.string" . }}
{{- if regexMatch "^--?[A-Za-z][^=\\s]*\\s" $word }}
{{ printf "%s: %s has %q, which no parser takes apart; write FLAG=VALUE, or flag and value as two items." (index $ 0) (index $ 1) $word }}
{{- end }}
{{- end }}
{{- end }}

{{/* Of what holds for every engine: secrets, placeholders, what KServe refuses. */}}
{{- define "kserve-vllm.check.environment" -}}
{{- $at := .at -}}
{{- $s := .s -}}
{{ include "kserve-vllm.check.words" (list $at "extraArgs" $s.extraArgs) }}
{{- range $s.extraArgs }}
{{- $flag := include "kserve-vllm.flag" . }}
{{- if include "kserve-vllm.secretWord" . }}
{{ printf "%s: extraArgs has --%s with a secret in plain text; give it as environment with valueFrom.secretKeyRef (--api-key is KSERVE_VLLM_API_KEY)." $at $flag }}
{{- end }}
{{- end }}
{{- range concat $s.args (list (toJson $s.env)) }}
{{- if contains "{{" . }}
{{ printf "%s: %q has two opening braces; KServe fills placeholders in arguments and environment, and would fail on it. Put a template into a ConfigMap (chatTemplate)." $at . }}
{{- end }}
{{- end }}
{{- range $s.env }}
{{- if eq .name "PYTHONPATH" }}
{{ printf "%s: KServe refuses PYTHONPATH in the environment." $at }}
{{- end }}
{{- if and $s.multiNode.enabled (has .name (list "PIPELINE_PARALLEL_SIZE" "TENSOR_PARALLEL_SIZE")) }}
{{ printf "%s: KServe sets %s of a multiNode service itself; set parallelism." $at .name }}
{{- end }}
{{- if include "kserve-vllm.secretVariable" . }}
{{ printf "%s: %s looks like a secret and is given as plain text; use valueFrom.secretKeyRef." $at .name }}
{{- end }}
{{- end }}
{{- end }}
