{{/* Of the model, its adapters and its runtime. */}}
{{- define "kserve-vllm.check.model" -}}
{{- $root := .root -}}
{{- $s := .s -}}
{{- $at := .at -}}
{{- $sources := 0 -}}
{{- range list $s.storageUri $s.model $s.demo $s.storage.path }}{{ if . }}{{ $sources = add1 $sources }}{{ end }}{{ end -}}
{{- if ne (int $sources) 1 }}
{{ printf "%s: give exactly one of storageUri, storage, model and demo; %d are given." $at (int $sources) }}
{{- end }}
{{- if and (not $s.stored) (ne $s.format "huggingface") }}
{{ printf "%s: without a storageUri and with modelFormat %s, KServe takes the service for multi-model serving and puts an agent sidecar into its pods. Give a storageUri, or leave modelFormat empty." $at $s.format }}
{{- end }}
{{- if and $s.fetchedAdapters (not $s.storageUri) }}
{{ printf "%s: KServe fetches an adapter's storageUri only together with the model's. Give the model as storageUri, or the adapter as path." $at }}
{{- end }}
{{- if and $s.fetchedAdapters (or (hasPrefix "pvc://" $s.storageUri) (hasPrefix "oci" $s.storageUri)) }}
{{ printf "%s: a model from pvc:// or oci:// is mounted whole, and adapters cannot be fetched beside it. Put the adapters into the same volume or image and give their path." $at }}
{{- end }}
{{- if and $s.canaryOn $s.storage.path }}
{{ printf "%s: a model in `storage` has no canary; give its address as storageUri." $at }}
{{- end }}
{{- range $s.fetchedAdapters }}
{{- if or (hasPrefix "pvc://" .storageUri) (hasPrefix "oci" .storageUri) }}
{{ printf "%s: adapter %s cannot come from %s, KServe would mount it whole. Give a path, or a storageUri that is fetched." $at .name .storageUri }}
{{- end }}
{{- end }}
{{- if and $s.lora.watched.configMap $s.lora.adapters }}
{{ printf "%s: lora.adapters are fixed with the pod, those of lora.watched come and go; list all of them in the ConfigMap of lora.watched." $at }}
{{- end }}
{{- $redis := $s.redis.secretName -}}
{{- range $s.env }}{{ if eq .name "KSERVE_VLLM_REDIS_URL" }}{{ $redis = .name }}{{ end }}{{ end -}}
{{- if and (eq $s.responseCache "redis") (not $redis) (not $s.envFrom) }}
{{ printf "%s: responseCache redis needs the address of a Redis; give redis.secretName." $at }}
{{- end }}
{{/* The runtime. */}}
{{- if not $s.runtime }}
{{- $own := index $root.Values.internal.runtimes $s.kind }}
{{- if not $root.Values.runtimes.enabled }}
{{ printf "%s: this release writes no runtimes (runtimes.enabled); name one of another release in `runtime`." $at }}
{{- else if not $own.enabled }}
{{ printf "%s: it runs on runtimes.%s, which is not enabled." $at (ternary (printf "engines.%s" $s.engine) $s.kind $s.other) }}
{{- end }}
{{- else }}
{{- range $kind := list "cpu" "gpu" "multinode" }}
{{- if and $root.Values.runtimes.enabled (index $root.Values.runtimes $kind).enabled (eq $s.runtime (include "kserve-vllm.runtimeName" (list $root $kind))) }}
{{ printf "%s: runtime %s is this release's own; leave `runtime` empty and choose by device and multiNode, from which it follows." $at $s.runtime }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
