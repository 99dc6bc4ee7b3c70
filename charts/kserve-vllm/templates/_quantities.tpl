{{/* Requests and limits: laid over each other, and such that the API server takes them. */}}

{{/* A quantity as a number. */}}
{{- define "kserve-vllm.amount" -}}
{{- $text := include "kserve-vllm.string" . -}}
{{- $unit := regexFind "[A-Za-z]+$" $text -}}
{{- $factors := dict "" 1.0 "n" 1e-9 "u" 1e-6 "m" 1e-3 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "Ei" 1152921504606846976.0 -}}
{{- mulf (trimSuffix $unit $text | float64) (index $factors $unit) -}}
{{- end }}

{{/* A map without what is null. Gives JSON. */}}
{{- define "kserve-vllm.given" -}}
{{- $out := dict -}}
{{- range $key, $value := . }}{{ if not (kindIs "invalid" $value) }}{{ $_ := set $out $key $value }}{{ end }}{{ end -}}
{{- $out | toJson -}}
{{- end }}

{{/* `yes` for a resource whose request is its limit: extended ones (DOMAIN/NAME) and huge pages. */}}
{{- define "kserve-vllm.whole" -}}
{{- if or (contains "/" .) (hasPrefix "hugepages-" .) }}yes{{ end -}}
{{- end }}

{{/*
Requests and limits as text. Takes (list chart's given): what is given is laid over the chart's. A limit that is given alone
lowers the chart's request, a request that is given alone raises the chart's limit; gives YAML.
*/}}
{{- define "kserve-vllm.quantities" -}}
{{- $given := last . -}}
{{- $out := dict "requests" dict "limits" dict -}}
{{- range $group, $texts := $out -}}
{{- range $ -}}
{{- range $name, $quantity := include "kserve-vllm.given" (index . $group) | fromJson }}{{ $_ := set $texts $name (include "kserve-vllm.string" $quantity) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- range $name, $limit := $out.limits -}}
{{- $request := index $out.requests $name | default "0" -}}
{{- if gt (include "kserve-vllm.amount" $request | float64) (include "kserve-vllm.amount" $limit | float64) -}}
{{- if hasKey (default dict $given.requests) $name }}{{ $_ := set $out.limits $name $request }}{{ else }}{{ $_ := set $out.requests $name $limit }}{{ end -}}
{{- end -}}
{{- end -}}
{{- range $name, $request := $out.requests -}}
{{- if and (include "kserve-vllm.whole" $name) (not (hasKey $out.limits $name)) }}{{ $_ := set $out.limits $name $request }}{{ end -}}
{{- end -}}
{{- range $group := list "requests" "limits" }}{{ if not (index $out $group) }}{{ $_ := unset $out $group }}{{ end }}{{ end -}}
{{- if $out }}{{ toYaml $out }}{{ end -}}
{{- end }}

{{/* Of requests and limits that are both given. Takes (list at resources). */}}
{{- define "kserve-vllm.check.quantities" -}}
{{- $at := index . 0 -}}
{{- $given := index . 1 -}}
{{- $given = dict "requests" (include "kserve-vllm.given" $given.requests | fromJson) "limits" (include "kserve-vllm.given" $given.limits | fromJson) -}}
{{- range $name, $limit := $given.limits }}
{{- if hasKey $given.requests $name }}
{{- $request := index $given.requests $name }}
{{- $asked := include "kserve-vllm.amount" $request | float64 }}
{{- $allowed := include "kserve-vllm.amount" $limit | float64 }}
{{- if gt $asked $allowed }}
{{ printf "%s: requests.%s %s is above limits.%s %s, and such a pod is refused; lower the one or raise the other." $at $name (include "kserve-vllm.string" $request) $name (include "kserve-vllm.string" $limit) }}
{{- else if and (include "kserve-vllm.whole" $name) (ne $asked $allowed) }}
{{ printf "%s: of %s a pod has what it asks for, so that requests and limits have to be the same; give the limit alone." $at $name }}
{{- end }}
{{- end }}
{{- end }}
{{- range $group := list "requests" "limits" }}
{{- range $name, $quantity := default dict (index $given $group) }}
{{- $amount := include "kserve-vllm.amount" $quantity | float64 }}
{{- if and (contains "/" $name) (ne $amount (floor $amount)) }}
{{ printf "%s: %s.%s is %s, and of devices there are whole ones." $at $group $name (include "kserve-vllm.string" $quantity) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
