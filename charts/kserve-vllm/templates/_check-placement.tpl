{{/* Of GPUs, nodes and ports. */}}
{{- define "kserve-vllm.check.placement" -}}
{{- $root := .root -}}
{{- $s := .s -}}
{{- $at := .at -}}
{{/* GPUs. */}}
{{- if eq $s.device "cpu" }}
{{- if $s.multiNode.enabled }}
{{ printf "%s: multiNode needs device gpu." $at }}
{{- end }}
{{- else if $s.sharedGpu }}
{{- if gt (int $s.gpusNeeded) 1 }}
{{ printf "%s: %s is a share of one GPU, but the parallelism needs %d GPUs." $at $s.gpu.resource (int $s.gpusNeeded) }}
{{- end }}
{{- else if and (not $s.byClaim) (lt (int $s.gpus) (int $s.gpusNeeded)) }}
{{ printf "%s: gpu.count is %d, but the parallelism (tensor %d, pipeline %d, data %d) needs %d GPUs in a pod." $at (int $s.gpus) (int $s.parallelism.tensor) (int $s.parallelism.pipeline) (int $s.parallelism.data) (int $s.gpusNeeded) }}
{{- end }}
{{- range $group := list "requests" "limits" }}
{{- if and (eq $s.device "gpu") (hasKey (index $s.resources $group) $s.gpu.resource) }}
{{ printf "%s: resources.%s has %s; set gpu.count instead, or gpu.resource to another one." $at $group $s.gpu.resource }}
{{- end }}
{{- end }}
{{ include "kserve-vllm.check.quantities" (list (printf "%s.resources" $at) $s.resources) }}

{{/* Multi-node. */}}
{{- if $s.multiNode.enabled }}
{{- if $s.knative }}
{{ printf "%s: multiNode works in Standard mode only; set deploymentMode: Standard." $at }}
{{- end }}
{{- if not (or (hasPrefix "pvc://" $s.storageUri) (hasPrefix "oci://" $s.storageUri)) }}
{{ printf "%s: multiNode takes the model from pvc:// or oci:// only." $at }}
{{- end }}
{{- if ne $s.class "none" }}
{{ printf "%s: multiNode does not scale; set autoscaling.class to none." $at }}
{{- end }}
{{- if lt (int $s.parallelism.pipeline) 2 }}
{{ printf "%s: multiNode takes one node for each pipeline stage; parallelism.pipeline must be 2 or more." $at }}
{{- end }}
{{- if gt (int $s.min) 1 }}
{{ printf "%s: KServe runs one group of nodes for a multiNode service; autoscaling.minReplicas must be 1." $at }}
{{- end }}
{{- if and (not $s.byClaim) (ne (int $s.gpus) (int $s.gpusNeeded)) }}
{{ printf "%s: with multiNode KServe gives each node parallelism.tensor GPUs; leave gpu.count empty." $at }}
{{- end }}
{{- if $s.sharedGpu }}
{{ printf "%s: %s is a share of a GPU, and a multiNode service takes whole ones." $at $s.gpu.resource }}
{{- end }}
{{- if hasPrefix "0.20." (printf "%s." (include "kserve-vllm.kserveVersion" $root)) }}
{{ printf "%s: KServe %s deletes the workers of a multiNode service at every reconcile; upgrade KServe to 0.21 or later." $at (include "kserve-vllm.kserveVersion" $root) }}
{{- end }}
{{- end }}
{{/* Ports and the objects around the pods. */}}
{{- $policy := $s.networkPolicy }}
{{- if and $policy.enabled $policy.restrictEgress (not $policy.egress) }}
{{- range $value, $address := dict "redis.secretName" (ternary "redis://" "" (ne $s.redis.secretName "")) "tracing.endpoint" $s.tracing.endpoint "usageSink" $s.usageSink }}
{{- if and (contains "://" $address) (not (and $policy.egressCIDRs (regexMatch "^https://[^:/]+(:443)?(/|$)" $address))) }}
{{ printf "%s: networkPolicy.restrictEgress lets nothing out to where %s leads; add a rule to networkPolicy.egress." $at $value }}
{{- end }}
{{- end }}
{{- end }}
{{- if $s.grpc.enabled }}
{{- $given := join " " $s.extraArgs }}
{{- range $s.env }}
{{- $given = printf "%s --%s=%s" $given (trimPrefix "KSERVE_VLLM_" .name | lower) (default "" .value | toString) }}
{{- end }}
{{- $off := regexFind "--(grpc[-_]server[= ]off|grpc[-_]server[= ]grpcio|http2[= ](false|0|no|off)|fast[-_]path[= ](none|false))( |$)" $given | trim }}
{{- if hasSuffix "off" $off | and (contains "server" $off) }}
{{ printf "%s: %s and grpc.enabled contradict each other; take one out." $at $off }}
{{- else if and $off $s.knative }}
{{ printf "%s: Knative takes one port, and with %s gRPC is not answered on it; take that out, or set deploymentMode: Standard." $at $off }}
{{- end }}
{{- end }}
{{- end }}
