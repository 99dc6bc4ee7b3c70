{{/* Of routes of one type. Takes (list $ type). */}}
{{- define "kserve-vllm.check.routes" -}}
{{- $root := index . 0 -}}
{{- $taken := dict -}}
{{- range $name, $r := $root.Values.internal.routes }}
{{- $at := printf "routes.%s" $name }}
{{- if eq $r.type (index $ 1) }}
{{- $carrier := ternary $r.ingress.className (printf "%s/%s/%s" $r.gateway.namespace $r.gateway.name $r.gateway.sectionName) (eq $r.type "Ingress") }}
{{- range $r.hosts }}
{{- $key := printf "%s %s %s" $r.type $carrier . }}
{{- if hasKey $taken $key }}
{{ printf "%s: host %s is answered by routes.%s already, at the same gateway; take it out of one." $at . (index $taken $key) }}
{{- end }}
{{- $_ := set $taken $key $name }}
{{- end }}
{{- $rules := 0 }}
{{- $seen := list }}
{{- range $r.targets }}
{{- $rules = add $rules (ternary 2 1 (dig "grpc" "enabled" false (index $root.Values.internal.services .inferenceService | default dict))) }}
{{- if .header }}
{{- $match := printf "%s: %s" (lower .header) .value }}
{{- if has $match $seen }}
{{ printf "%s: headerRoutes has %s twice, and the second one is never asked; take it out." $at $match }}
{{- end }}
{{- $seen = append $seen $match }}
{{- end }}
{{- if and $r.outlierEjection.enabled (eq $r.type "Istio") .inferenceService }}
{{- $key := printf "ejection %s" .inferenceService }}
{{- if ne (index $taken $key | default $name) $name }}
{{ printf "%s: routes.%s has outlierEjection for %s already, and Istio takes one DestinationRule for a host; switch one off." $at (index $taken $key) .inferenceService }}
{{- end }}
{{- $_ := set $taken $key $name }}
{{- end }}
{{- end }}
{{- if and (eq $r.type "GatewayAPI") (gt (int $rules) 16) }}
{{ printf "%s: an HTTPRoute has at most 16 rules, and this one would have %d (two for a service with grpc); spread headerRoutes over services of one host each." $at (int $rules) }}
{{- end }}
{{- if not $r.hosts }}
{{ printf "%s: give at least one host." $at }}
{{- end }}
{{- range $r.targets }}
{{- $s := index $root.Values.internal.services .inferenceService }}
{{- if not .inferenceService }}
{{ printf "%s: give inferenceService, the name of the one that answers." $at }}
{{- else if not $s }}
{{ printf "%s: there is no inferenceServices.%s." $at .inferenceService }}
{{- else }}
{{- if and $s.knative (ne $r.type "Istio") }}
{{ printf "%s: in Knative mode the Service of %s points at Knative's gateway and cannot be the backend of an %s; use type Istio, or Standard mode." $at .inferenceService (ternary "HTTPRoute" "Ingress" (eq $r.type "GatewayAPI")) }}
{{- end }}
{{- if and $s.knative $r.outlierEjection.enabled (eq $r.type "Istio") }}
{{ printf "%s: outlierEjection needs the pods behind the route, but those of %s are behind Knative's gateway." $at .inferenceService }}
{{- end }}
{{- if lt (int $r.timeoutSeconds) (int $s.timeout) }}
{{ printf "%s: its timeoutSeconds %d would cut streams of %s, which may take %d s." $at (int $r.timeoutSeconds) .inferenceService (int $s.timeout) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and $r.outlierEjection.enabled (ne $r.type "Istio") }}
{{ printf "%s: outlierEjection is Istio's; set type: Istio." $at }}
{{- end }}
{{- if and (eq $r.type "Ingress") $r.headerRoutes }}
{{ printf "%s: an Ingress cannot route by header; take headerRoutes out, or use type GatewayAPI or Istio." $at }}
{{- end }}
{{- $object := include "kserve-vllm.routeName" $name }}
{{- range $service, $_ := $root.Values.internal.services }}
{{- if has $object (list $service (include "kserve-vllm.predictorName" $service)) }}
{{ printf "%s: its object would be called %s, as the one that KServe writes for inferenceServices.%s; give the route another name." $at $object $service }}
{{- end }}
{{- end }}
{{ include "kserve-vllm.idle.entry" (dict "root" $root "at" $at "kind" "routes" "chart" "routeDefaults" "entry" $r) }}
{{- end }}
{{- end }}
{{- end }}
