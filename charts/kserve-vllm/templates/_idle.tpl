{{/*
Values that do nothing. files/needs.yaml says which value needs which condition; here the conditions are worked out, and
each value that is not the chart's default while its condition does not hold gives a sentence.
*/}}

{{/*
Collect them. Takes a dict with root, table (key in needs.yaml), values (whole), chart (the defaults) and conditions; sets
`idle` in it, a dict from path to reason.
*/}}
{{- define "kserve-vllm.idle" -}}
{{- $needs := .root.Files.Get "files/needs.yaml" | fromYaml -}}
{{- $changed := dict "paths" list -}}
{{- include "kserve-vllm.changed" (list $changed "" .values .chart) -}}
{{- $idle := dict -}}
{{- range $path := $changed.paths -}}
{{- range $value, $conditions := index $needs $.table -}}
{{- if or (eq $path $value) (hasPrefix (printf "%s." $value) $path) -}}
{{- range $conditions -}}
{{- if and (not (index $.conditions .)) (not (hasKey $idle $path)) }}{{ $_ := set $idle $path (index $needs.reasons .) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $_ := set . "idle" $idle -}}
{{- end }}

{{/* Collect the paths whose values are not the defaults. Takes (list dict-with-paths prefix values defaults). */}}
{{- define "kserve-vllm.changed" -}}
{{- $out := index . 0 -}}
{{- $prefix := index . 1 -}}
{{- $values := index . 2 -}}
{{- range $key, $default := index . 3 -}}
{{- $value := index $values $key -}}
{{- if and (kindIs "map" $default) (kindIs "map" $value) $default (ne $key "labels") -}}
{{- include "kserve-vllm.changed" (list $out (printf "%s%s." $prefix $key) $value $default) -}}
{{- else if ne (toJson $value) (toJson $default) -}}
{{- $_ := set $out "paths" (append $out.paths (printf "%s%s" $prefix $key)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/*
Of the InferenceServices. What an entry says itself is refused where it is; what inferenceServiceDefaults say, only when it
does nothing for any entry.
*/}}
{{- define "kserve-vllm.idle.services" -}}
{{- $chart := .Values.internal.defaults.inferenceServiceDefaults -}}
{{- $inherited := dict -}}
{{- range $name, $s := .Values.internal.services }}
{{- $found := dict "root" $ "table" "inferenceServices" "values" $s "chart" $chart "conditions" (include "kserve-vllm.serviceConditions" $s | fromJson) }}
{{- include "kserve-vllm.idle" $found }}
{{- range $path, $reason := $found.idle }}
{{- $own := dict "in" (index $.Values.inferenceServices $name) "path" $path }}
{{- include "kserve-vllm.get" $own }}
{{- if $own.found }}
{{ printf "inferenceServices.%s: %s does nothing %s." $name $path $reason }}
{{- else }}
{{- $_ := set $inherited $path (append (default list (index $inherited $path)) $reason) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $path, $reasons := $inherited }}
{{- if eq (len $reasons) (len $.Values.internal.services) }}
{{ printf "inferenceServiceDefaults: %s does nothing for any InferenceService: it does nothing %s." $path (first $reasons) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "kserve-vllm.serviceConditions" -}}
{{- $scaler := has .class (list "hpa" "keda") -}}
{{- dict
  "gpu" (eq .device "gpu")
  "knative" .knative
  "standard" (not .knative)
  "products" (not (empty .gpu.products))
  "engineLoads" (ne .model "")
  "token" (ne .huggingFaceToken.secretName "")
  "chatTemplate" (ne .chatTemplate.configMap "")
  "apiKeys" (ne .apiKeys.secretName "")
  "redis" (ne .redis.secretName "")
  "watched" (ne .lora.watched.configMap "")
  "warmup" (ne .warmup.configMap "")
  "moderation" (ne .moderation.configMap "")
  "adapters" (not (empty .lora.adapters))
  "scaled" (ne .class "none")
  "scaler" $scaler
  "keda" (eq .class "keda")
  "kedaName" (ne .autoscaling.kedaAuthentication.name "")
  "hpaOnVllm" (and (eq .class "hpa") (not .resourceMetric))
  "toZero" (eq (int .min) 0)
  "canary" .canaryOn
  "budget" .podDisruptionBudget.enabled
  "policy" .networkPolicy.enabled
  "egress" .networkPolicy.restrictEgress
  "counted" (not .byClaim)
  "claims" (not .multiNode.enabled)
  "stored" (ne .storage.path "")
  "fetched" (ne .storageUri "")
  "tracing" (ne .tracing.endpoint "")
  "drains" (or (not .other) (not .knative) (hasKey (.facts.variables | default dict) "drain.timeoutSeconds") (hasKey (.facts.flags | default dict) "drain.timeoutSeconds"))
  "delays" (not (and .other .knative))
| toJson -}}
{{- end }}

{{/* Of a route, a model cache, a runtime, a batch or a rollout. Takes a dict with root, at, kind, chart (key of the defaults) and entry. */}}
{{- define "kserve-vllm.idle.entry" -}}
{{- $e := .entry -}}
{{- $conditions := dict -}}
{{- if eq .kind "routes" -}}
{{- $conditions = dict "ejection" $e.outlierEjection.enabled "gatewayAPI" (eq $e.type "GatewayAPI") "gateway" (ne $e.type "Ingress") "ingress" (eq $e.type "Ingress") "timeouts" (or $e.gateway.timeouts (ne $e.type "GatewayAPI")) -}}
{{- else if eq .kind "batchJobs" -}}
{{- $conditions = dict "ownServer" (eq $e.url "") "elsewhere" (ne $e.url "") "batchKey" (ne $e.apiKey.secretName "") -}}
{{- else if eq .kind "rolloutJobs" -}}
{{- $conditions = dict "rolloutToken" (ne $e.prometheus.tokenSecret.name "") "answers" (ne $e.answers.configMap "") "answersKey" (ne $e.answers.apiKey.secretName "") -}}
{{- else if eq .kind "extra" -}}
{{- $conditions = dict "onCpu" (eq $e.base "cpu") -}}
{{- else -}}
{{- $filled := eq $e.type "PersistentVolumeClaim" -}}
{{- $conditions = dict "ownClaim" (eq $e.claim.existing "") "filled" $filled "kept" (not $filled) "repository" (ne $e.huggingFace.repository "") "built" (ne $e.tensorrtLLM.model "") "hubToken" (ne $e.huggingFace.tokenSecret.name "") -}}
{{- end -}}
{{- $found := dict "root" .root "table" .kind "values" $e "chart" (index .root.Values.internal.defaults .chart) "conditions" $conditions -}}
{{- include "kserve-vllm.idle" $found -}}
{{- range $path, $reason := $found.idle }}
{{ printf "%s: %s does nothing %s." $.at $path $reason }}
{{- end }}
{{- end }}

{{/* Of what belongs to the release as a whole. */}}
{{- define "kserve-vllm.idle.release" -}}
{{- $on := .Values.runtimes.enabled -}}
{{- $cpu := and $on .Values.runtimes.cpu.enabled -}}
{{- $gpu := and $on (or .Values.runtimes.gpu.enabled .Values.runtimes.multinode.enabled) -}}
{{- $services := not (empty .Values.internal.services) -}}
{{- $jobs := false -}}
{{- $cpuJobs := not (empty .Values.internal.rollouts) -}}
{{- if $cpuJobs }}{{ $jobs = true }}{{ end -}}
{{- range .Values.internal.caches }}{{ if eq .type "PersistentVolumeClaim" }}{{ $jobs = true }}{{ $cpuJobs = true }}{{ end }}{{ end -}}
{{- $batchImages := list -}}
{{- range .Values.internal.batches }}{{ $jobs = true }}{{ $batchImages = append $batchImages .serverImage }}{{ end -}}
{{- $keys := false -}}
{{- range .Values.internal.services }}{{ if .apiKeys.secretName }}{{ $keys = true }}{{ end }}{{ end -}}
{{- $cpuImage := or $cpuJobs (has "cpu" $batchImages) (and .Values.tests.enabled $services) -}}
{{- $gpuImage := has "gpu" $batchImages -}}
{{- range $key, $runtime := .Values.internal.runtimes -}}
{{- if and $on $runtime.enabled (not $runtime.image) -}}
{{- if eq $runtime.base "cpu" }}{{ $cpuImage = true }}{{ else }}{{ $gpuImage = true }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $extra := and $on (not (empty .Values.internal.extras)) -}}
{{- $conditions := dict
  "pods" (or $cpuImage $gpuImage $services $cpu $gpu $extra)
  "outward" (or $services $jobs)
  "caBundle" (or (ne .Values.caBundle.configMap "") (ne .Values.caBundle.secretName ""))
  "proxy" (or (ne .Values.proxy.httpProxy "") (ne .Values.proxy.httpsProxy ""))
  "images" (or $cpuImage $gpuImage)
  "cpuImage" $cpuImage
  "gpuImage" $gpuImage
  "runtimesOn" $on
  "runtimes" (or $cpu $gpu $extra)
  "ownRuntimes" (or $cpu $gpu)
  "cpuRuntime" .Values.runtimes.cpu.enabled
  "gpuRuntime" .Values.runtimes.gpu.enabled
  "multinodeRuntime" .Values.runtimes.multinode.enabled
  "services" $services
  "keys" $keys
  "tests" .Values.tests.enabled
  "testKey" (ne .Values.tests.apiKey.secretName "")
  "podMonitor" .Values.monitoring.podMonitor.enabled
  "prometheusRule" .Values.monitoring.prometheusRule.enabled
  "dashboards" .Values.monitoring.dashboards.enabled -}}
{{- $found := dict "root" . "table" "release" "values" .Values "chart" .Values.internal.defaults "conditions" $conditions -}}
{{- include "kserve-vllm.idle" $found -}}
{{- range $path, $reason := $found.idle }}
{{- if not (has $path $.Values.internal.inherited) }}
{{ printf "%s does nothing %s." $path $reason }}
{{- end }}
{{- end }}
{{- end }}
