{{/* A scalar as text: a whole number has no exponent. */}}
{{- define "kserve-vllm.string" -}}
{{- if kindIs "float64" . }}{{ if eq (floor .) . }}{{ printf "%.0f" . }}{{ else }}{{ . }}{{ end }}{{ else }}{{ . }}{{ end -}}
{{- end }}

{{/* A map with text for values, as labels and annotations must be, without keys that are null. */}}
{{- define "kserve-vllm.strings" -}}
{{- $out := dict -}}
{{- range $key, $value := . }}{{ if not (kindIs "invalid" $value) }}{{ $_ := set $out $key (include "kserve-vllm.string" $value) }}{{ end }}{{ end -}}
{{- if $out }}{{ toYaml $out }}{{ end -}}
{{- end }}

{{/* Maps laid over each other, the later one wins key by key. Takes a list of maps; gives YAML. */}}
{{- define "kserve-vllm.mergeMaps" -}}
{{- $out := dict -}}
{{- range . }}{{ range $key, $value := . }}{{ $_ := set $out $key $value }}{{ end }}{{ end -}}
{{- include "kserve-vllm.strings" $out -}}
{{- end }}

{{/*
Lists of objects merged by a key: what comes later wins and stands where the earlier one stood. Takes (list key list...);
gives YAML. An API server refuses lists such as env with a key twice.
*/}}
{{- define "kserve-vllm.mergeLists" -}}
{{- $key := first . -}}
{{- $order := list -}}
{{- $items := dict -}}
{{- range rest . -}}
{{- range . -}}
{{- $name := index . $key -}}
{{- if not (has $name $order) }}{{ $order = append $order $name }}{{ end -}}
{{- $_ := set $items $name . -}}
{{- end -}}
{{- end -}}
{{- $out := list -}}
{{- range $order }}{{ $out = append $out (index $items .) }}{{ end -}}
{{- if $out }}{{ toYaml $out }}{{ end -}}
{{- end }}

{{/* Environment variables merged by name, their values as text. Takes a list of lists; gives YAML. */}}
{{- define "kserve-vllm.env" -}}
{{- $lists := list "name" -}}
{{- range . -}}
{{- $texts := list -}}
{{- range . -}}
{{- $texts = append $texts (ternary (dict "name" .name "value" (include "kserve-vllm.string" .value)) . (hasKey . "value")) -}}
{{- end -}}
{{- $lists = append $lists $texts -}}
{{- end -}}
{{- include "kserve-vllm.mergeLists" $lists -}}
{{- end }}

{{/* Tolerations, whose values are text. */}}
{{- define "kserve-vllm.tolerations" -}}
{{- $out := list -}}
{{- range . -}}
{{- $toleration := deepCopy . -}}
{{- if hasKey . "value" }}{{ $_ := set $toleration "value" (include "kserve-vllm.string" .value) }}{{ end -}}
{{- $out = append $out $toleration -}}
{{- end -}}
{{- toYaml $out -}}
{{- end }}

{{/* Names of Secrets as Kubernetes lists them, each once. */}}
{{- define "kserve-vllm.secretNames" -}}
{{- $out := list -}}
{{- range . }}{{ $out = append $out (dict "name" (include "kserve-vllm.string" .)) }}{{ end -}}
{{- include "kserve-vllm.mergeLists" (list "name" $out) -}}
{{- end }}

{{/* A list of words as YAML, safe for any content. */}}
{{- define "kserve-vllm.stringList" -}}
{{- range $i, $item := . }}{{ if $i }}{{ "\n" }}{{ end }}- {{ include "kserve-vllm.string" $item | quote }}{{ end }}
{{- end }}
