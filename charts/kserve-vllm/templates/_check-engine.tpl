{{/* Of a service on another engine: what of its values that engine cannot do, each with what to do instead. */}}
{{- define "kserve-vllm.check.engine" -}}
{{- $root := .root -}}
{{- $s := .s -}}
{{- $at := .at -}}
{{- $facts := $s.facts -}}
{{- $table := ($root.Files.Get "files/needs.yaml" | fromYaml).engines -}}
{{- if not (hasKey $facts.images $s.device) }}
{{ printf "%s: %s runs on %s only; set device." $at $facts.title (keys $facts.images | sortAlpha | join ", ") }}
{{- end }}
{{- if and $s.model (not (index $facts.flags "model")) }}
{{ printf "%s: %s takes no model; give %s." $at $facts.title $facts.instead.model }}
{{- end }}
{{- $changed := dict "paths" list }}
{{- include "kserve-vllm.changed" (list $changed "" $s $root.Values.internal.defaults.inferenceServiceDefaults) }}
{{- $able := concat (keys $facts.flags) (keys $facts.variables) (keys $facts.splits) }}
{{- if index $facts.flags "chatTemplate.configMap" }}{{ $able = append $able "chatTemplate.key" }}{{ end }}
{{- if $facts.context }}{{ $able = append $able "maxModelLen" }}{{ end }}
{{- if $facts.adapters }}{{ $able = append $able "lora.adapters" }}{{ end }}
{{- if $facts.embed }}{{ $able = append $able "task" }}{{ end }}
{{- if $facts.grpc }}{{ $able = append $able "grpc.enabled" }}{{ end }}
{{- if eq $s.modelFormat "huggingface" }}{{ $able = append $able "modelFormat" }}{{ end }}
{{- range $path := $changed.paths }}
{{- $top := splitList "." $path | first }}
{{- if and (hasKey $table $top) (not (has $path $able)) }}
{{- $reason := index $table $top }}
{{- with index $facts.instead $top }}{{ $reason = printf "use %s" . }}{{ end }}
{{ printf "%s: %s cannot do %s: %s. Take it out (null takes back what inferenceServiceDefaults say), or stay on engine kserve-vllm." $at $facts.title $path $reason }}
{{- end }}
{{- end }}
{{- range $word := $s.extraArgs }}
{{- $flag := regexReplaceAll "=.*" $word "" }}
{{- if hasKey $facts.owned $flag }}
{{- with index $facts.owned $flag }}
{{ printf "%s: extraArgs has %s; set %s instead, other values are derived from it." $at $flag . }}
{{- else }}
{{ printf "%s: extraArgs has %s, which probes, ports and Services of the chart rely on." $at $flag }}
{{- end }}
{{- end }}
{{- end }}
{{- range $s.env }}
{{- if hasPrefix "KSERVE_VLLM_" .name }}
{{ printf "%s: %s in env is read by kserve-vllm alone, and %s is another engine." $at .name $facts.title }}
{{- end }}
{{- if hasKey $facts.ownedEnv .name }}
{{ printf "%s: %s in env is the chart's; set %s instead." $at .name (index $facts.ownedEnv .name | default "runtimes.host, if anything") }}
{{- end }}
{{- end }}
{{- $measured := index (dict "queue-depth" "queue" "kv-cache" "cache" "ttft-p99" "firstToken") $s.metric }}
{{- if and $measured (not (index $facts.metrics $measured)) }}
{{ printf "%s: %s has no metric for autoscaling.metric %s; it has %s." $at $facts.title $s.metric (include "kserve-vllm.engine.scalable" $facts) }}
{{- end }}
{{- if and $measured (not $s.autoscaling.hpaMetricName) (eq $s.metric "ttft-p99") (eq $s.class "hpa") (index $facts.metrics $measured) }}
{{ printf "%s: give autoscaling.hpaMetricName, under which prometheus-adapter serves the quantile." $at }}
{{- end }}
{{- end }}

{{/* What an engine can be scaled by, in words. Takes its facts. */}}
{{- define "kserve-vllm.engine.scalable" -}}
{{- $names := list "cpu and memory (class hpa)" -}}
{{- range $metric, $key := dict "queue-depth" "queue" "kv-cache" "cache" "ttft-p99" "firstToken" -}}
{{- if index $.metrics $key }}{{ $names = append $names $metric }}{{ end -}}
{{- end -}}
{{- join ", " $names -}}
{{- end }}

{{/* Of the runtimes of other engines: settings of one that is not written. */}}
{{- define "kserve-vllm.check.engines" -}}
{{- range $name, $own := .Values.runtimes.engines }}
{{- if and (kindIs "map" $own) (not (hasKey $own "enabled")) (omit $own "enabled") }}
{{- $used := false }}
{{- range $key, $_ := $.Values.internal.engineRuntimes }}{{ if hasPrefix (printf "engine.%s." $name) $key }}{{ $used = true }}{{ end }}{{ end }}
{{- if and (not $used) $.Values.runtimes.enabled }}
{{ printf "runtimes.engines.%s: what it says does nothing, since no InferenceService has engine %s; set its enabled to true to write the runtime all the same." $name $name }}
{{- end }}
{{- end }}
{{- end }}
{{- range $key, $_ := .Values.internal.engineRuntimes }}
{{ include "kserve-vllm.check.runtime" (list $ $key) }}
{{- end }}
{{- end }}
