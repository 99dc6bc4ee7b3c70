{{/*
Other engines than kserve-vllm. What is known of each of them is in files/engines/NAME.yaml: image, port, flags, probes,
metrics. Here the values of a service become its flags, and it gets its runtimes, one for each device.

A file has: title, images (by device), command, or script (in files/scripts) with program, args and env (HOST is the address
to listen on), deviceArgs, protocols, ready and live (paths), api (prefix of its HTTP routes), metrics (port, and names by
what they measure), sequences (that it runs at once unless maxNumSeqs says otherwise), flags and variables (by value of the
chart), context, threads, splits, embed, adapters, grpc, owned and ownedEnv (flags that the chart gives), instead (by value).
*/}}

{{/* The files, and the runtimes by key `engine.NAME.DEVICE`, into internal. Takes (list $ internal). */}}
{{- define "kserve-vllm.load.engines" -}}
{{- $root := index . 0 -}}
{{- $internal := index . 1 -}}
{{- $engines := dict -}}
{{- range $path, $_ := $root.Files.Glob "files/engines/*.yaml" -}}
{{- $empty := dict "env" dict "deviceArgs" dict "protocols" (list "v1") "metrics" dict "flags" dict "variables" dict "splits" dict "embed" list "adapters" dict "grpc" false "ownedEnv" dict "context" "" "threads" "" "script" "" -}}
{{- $facts := merge ($root.Files.Get $path | fromYaml) $empty -}}
{{- $name := base $path | trimSuffix ".yaml" -}}
{{- $_ := set $engines $name $facts -}}
{{- $entry := deepCopy $root.Values.engineRuntimeDefaults -}}
{{- include "kserve-vllm.overlay" (list $entry (index $root.Values.runtimes.engines $name | default dict) $internal.defaults.engineRuntimeDefaults) -}}
{{- range $device, $image := $facts.images -}}
{{- $runtime := deepCopy $entry -}}
{{- $_ := set $runtime "name" (printf "%s-%s" (default (printf "kserve-%s" $name) $entry.name) $device) -}}
{{/* A mirror has the images under their paths, and only those that are not given whole. */}}
{{- $mirror := $entry.registry | default (default dict $root.Values.global).imageRegistry -}}
{{- if $mirror }}{{ $image = regexReplaceAll "^[^/]+" $image $mirror }}{{ end -}}
{{- $_ := set $runtime "image" (index $entry.images $device | default $image) -}}
{{- $_ := set $runtime "base" $device -}}
{{- $_ := set $runtime "engine" $name -}}
{{- $_ := set $runtime "facts" $facts -}}
{{- $_ := set $internal.runtimes (printf "engine.%s.%s" $name $device) $runtime -}}
{{- end -}}
{{- end -}}
{{- $_ := set $internal "engines" $engines -}}
{{- end }}

{{/* The runtimes of engines that are written: where `enabled` says so, or where it is empty and a service runs on it. */}}
{{- define "kserve-vllm.load.engineRuntimes" -}}
{{- $internal := .Values.internal -}}
{{- $written := dict -}}
{{- range $key, $runtime := $internal.runtimes -}}
{{- if hasPrefix "engine." $key -}}
{{- $used := false -}}
{{- range $internal.services }}{{ if and (eq .kind $key) (not .runtime) }}{{ $used = true }}{{ end }}{{ end -}}
{{- $_ := set $runtime "used" $used -}}
{{- $on := ternary $used $runtime.enabled (kindIs "invalid" $runtime.enabled) -}}
{{- $_ := set $runtime "enabled" $on -}}
{{- if and $on $.Values.runtimes.enabled }}{{ $_ := set $written $key $runtime }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $_ := set $internal "engineRuntimes" $written -}}
{{- end }}

{{/* Key of the runtime of a service. Takes (list $ service). A device that the engine lacks is refused later. */}}
{{- define "kserve-vllm.engine.kind" -}}
{{- $s := index . 1 -}}
{{- $devices := keys (index (index . 0).Values.internal.engines $s.engine).images | sortAlpha -}}
{{- printf "engine.%s.%s" $s.engine (ternary $s.device (first $devices) (has $s.device $devices)) -}}
{{- end }}

{{/* Arguments and environment of a service on another engine. Sets args, engineArgs, engineEnv and modelFlag in it. */}}
{{- define "kserve-vllm.engine.arguments" -}}
{{- $facts := .facts -}}
{{- $args := list -}}
{{- $env := list -}}
{{- $modelFlag := index $facts.flags "model" | default "--model" -}}
{{- $_ := set . "modelFlag" $modelFlag -}}
{{- with .model }}{{ $args = append $args (printf "%s=%s" $modelFlag .) }}{{ end -}}
{{- if .fetchedAdapters }}{{ $args = append $args (printf "%s=/mnt/models/base" $modelFlag) }}{{ end -}}
{{- $settings := dict "maxNumSeqs" .sequences "maxModelLen" .maxModelLen "quantization" .quantization "tracing.endpoint" .tracing.endpoint "lora.maxLoras" .lora.maxLoras "lora.maxRank" .lora.maxRank "drain.timeoutSeconds" .drainTimeout -}}
{{- range $axis, $size := .parallelism }}{{ if gt (int $size) 1 }}{{ $_ := set $settings (printf "parallelism.%s" $axis) $size }}{{ end }}{{ end -}}
{{- range $path, $value := $settings -}}
{{- if $value -}}
{{- $text := include "kserve-vllm.string" $value -}}
{{- with index $facts.flags $path }}{{ $args = append $args (printf "%s=%s" . $text) }}{{ end -}}
{{- with index $facts.variables $path }}{{ $env = append $env (dict "name" . "value" $text) }}{{ end -}}
{{- with index $facts.splits $path }}{{ $args = append $args . }}{{ end -}}
{{- end -}}
{{- end -}}
{{- if and $facts.context .maxModelLen }}{{ $args = append $args (printf "%s=%d" $facts.context (mul (int .maxModelLen) (int .sequences))) }}{{ end -}}
{{- with and $facts.threads (index .resources.limits "cpu" | default (index .resources.requests "cpu")) -}}
{{- $cpu := include "kserve-vllm.string" . -}}
{{- $threads := ternary (divf (trimSuffix "m" $cpu | float64) 1000) (trimSuffix "m" $cpu | float64) (hasSuffix "m" $cpu) -}}
{{- $args = append $args (printf "%s=%d" $facts.threads (ceil $threads | int)) -}}
{{- end -}}
{{- if eq .task "embed" }}{{ $args = concat $args $facts.embed }}{{ end -}}
{{- if and .lora.adapters $facts.adapters -}}
{{- $words := list -}}
{{- range .lora.adapters }}{{ $words = append $words (printf "%s=%s" .name (default (printf "/mnt/models/adapters/%s" .name) .path)) }}{{ end -}}
{{- with $facts.adapters.flag }}{{ $args = concat $args (list .) $words }}{{ end -}}
{{- with $facts.adapters.variable }}{{ $env = append $env (dict "name" . "value" (join "," $words)) }}{{ end -}}
{{- end -}}
{{- range .files }}{{ if .flag }}{{ $args = append $args (printf "--%s=/etc/kserve-vllm/%s/%s" .flag .name .key) }}{{ end }}{{ end -}}
{{- $extra := list -}}
{{- range .extraArgs }}{{ $extra = append $extra (include "kserve-vllm.string" .) }}{{ end -}}
{{- $_ := set . "extraArgs" $extra -}}
{{- $_ := set . "engineEnv" $env -}}
{{- $_ := set . "engineArgs" $extra -}}
{{- $_ := set . "args" (concat $args $extra) -}}
{{- end }}
