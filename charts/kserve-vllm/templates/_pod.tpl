{{/* Affinity with the GPU products in every required term, since terms are alternatives. */}}
{{- define "kserve-vllm.affinity" -}}
{{- $affinity := deepCopy .affinity -}}
{{- if and .gpu.products (eq .device "gpu") -}}
{{- $products := dict "key" .gpu.productLabel "operator" "In" "values" .gpu.products -}}
{{- $node := default dict $affinity.nodeAffinity -}}
{{- $required := default dict $node.requiredDuringSchedulingIgnoredDuringExecution -}}
{{- $terms := list -}}
{{- range default (list dict) $required.nodeSelectorTerms -}}
{{- $terms = append $terms (set . "matchExpressions" (append (default list .matchExpressions) $products)) -}}
{{- end -}}
{{- $node = set $node "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" $terms) -}}
{{- $affinity = set $affinity "nodeAffinity" $node -}}
{{- end -}}
{{- range $kind, $terms := $affinity }}{{ if not $terms }}{{ $affinity = omit $affinity $kind }}{{ end }}{{ end -}}
{{- if $affinity }}{{ toYaml $affinity }}{{ end -}}
{{- end }}

{{/* CPU, memory and GPUs. A limit given alone is the request too: the runtime's request may be above it. */}}
{{- define "kserve-vllm.resources" -}}
{{- $given := include "kserve-vllm.quantities" (list (dict "requests" .resources.limits) .resources) | fromYaml -}}
{{- $requests := default dict $given.requests -}}
{{- $limits := default dict $given.limits -}}
{{- if gt (int .gpus) 0 -}}
{{- $requests = set $requests .gpu.resource (int .gpus | toString) -}}
{{- $limits = set $limits .gpu.resource (int .gpus | toString) -}}
{{- end -}}
{{- $out := dict -}}
{{- if $requests }}{{ $out = set $out "requests" $requests }}{{ end -}}
{{- if $limits }}{{ $out = set $out "limits" $limits }}{{ end -}}
{{- $claims := list -}}
{{- range .resourceClaims }}{{ $claims = append $claims (dict "name" .name) }}{{ end -}}
{{- if $claims }}{{ $out = set $out "claims" $claims }}{{ end -}}
{{- if $out }}{{ toYaml $out }}{{ end -}}
{{- end }}

{{/* Pod fields that a runtime cannot carry, for head and workers alike. */}}
{{- define "kserve-vllm.podFields" -}}
# KServe would otherwise leave it to its configuration.
automountServiceAccountToken: false
# A Service named kserve-vllm would turn into environment that looks like settings of the runtime.
enableServiceLinks: false
{{- with .serviceAccountName }}
serviceAccountName: {{ . | quote }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .schedulerName }}
schedulerName: {{ . | quote }}
{{- end }}
{{- with .initContainers }}
initContainers:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .resourceClaims }}
resourceClaims:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- include "kserve-vllm.strings" . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- include "kserve-vllm.tolerations" . | nindent 2 }}
{{- end }}
{{- with include "kserve-vllm.affinity" . }}
affinity:
  {{- . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- /* Without a selector a constraint counts no pods, and does nothing. */}}
  {{- $own := dict "labelSelector" (dict "matchLabels" (dict "serving.kserve.io/inferenceservice" $.name)) }}
  - {{- hasKey . "labelSelector" | ternary . (merge $own .) | toYaml | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Annotations of the pods or, in Knative, of the revision: knobs that have a value, and what the user gives, who wins. */}}
{{- define "kserve-vllm.predictorAnnotations" -}}
{{- include "kserve-vllm.mergeMaps" (list (include "kserve-vllm.knativeAnnotations" . | fromYaml) .podAnnotations) -}}
{{- end }}

{{- define "kserve-vllm.knativeAnnotations" -}}
{{- $k := .autoscaling.knative -}}
{{- if .knative }}
{{- with .progressDeadlineSeconds }}
serving.knative.dev/progress-deadline: {{ printf "%ds" (int .) }}
{{- end }}
{{- with $k.targetUtilizationPercentage }}
autoscaling.knative.dev/target-utilization-percentage: {{ int . | quote }}
{{- end }}
{{- with $k.windowSeconds }}
autoscaling.knative.dev/window: {{ printf "%ds" (int .) }}
{{- end }}
{{- with $k.panicWindowPercentage }}
autoscaling.knative.dev/panic-window-percentage: {{ . | quote }}
{{- end }}
{{- with $k.panicThresholdPercentage }}
autoscaling.knative.dev/panic-threshold-percentage: {{ . | quote }}
{{- end }}
{{- if not (kindIs "invalid" $k.scaleDownDelaySeconds) }}
autoscaling.knative.dev/scale-down-delay: {{ printf "%ds" (int $k.scaleDownDelaySeconds) }}
{{- end }}
{{- if not (kindIs "invalid" $k.scaleToZeroRetentionSeconds) }}
autoscaling.knative.dev/scale-to-zero-pod-retention-period: {{ printf "%ds" (int $k.scaleToZeroRetentionSeconds) }}
{{- end }}
{{- if not (kindIs "invalid" $k.targetBurstCapacity) }}
autoscaling.knative.dev/target-burst-capacity: {{ int $k.targetBurstCapacity | quote }}
{{- end }}
{{- if not (kindIs "invalid" $k.initialScale) }}
autoscaling.knative.dev/initial-scale: {{ int $k.initialScale | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Environment of the serving container: what Secrets hold, under what the user gives. */}}
{{- define "kserve-vllm.serviceEnv" -}}
{{- $own := list -}}
{{- with .redis.secretName }}{{ $own = append $own (dict "name" "KSERVE_VLLM_REDIS_URL" "valueFrom" (dict "secretKeyRef" (dict "name" . "key" $.redis.key))) }}{{ end -}}
{{- with .huggingFaceToken.secretName }}{{ $own = append $own (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" . "key" $.huggingFaceToken.key))) }}{{ end -}}
{{- include "kserve-vllm.env" (list .outwardEnv .compiled.env (default list .engineEnv) $own .env) -}}
{{- end }}

{{/* Volumes of the predictor by name, the user's over the chart's over the runtime's. */}}
{{- define "kserve-vllm.serviceVolumes" -}}
{{- $own := list -}}
{{- with .tmpSizeLimit }}{{ $own = append $own (dict "name" "tmp" "emptyDir" (dict "sizeLimit" .)) }}{{ end -}}
{{- with .sharedMemory }}{{ $own = append $own (dict "name" "shm" "emptyDir" (dict "medium" "Memory" "sizeLimit" .)) }}{{ end -}}
{{- range .files }}{{ $own = append $own (include "kserve-vllm.fileVolume" . | fromJson) }}{{ end -}}
{{- include "kserve-vllm.mergeLists" (list "name" $own .compiled.volumes .extraVolumes) -}}
{{- end }}

{{/* Mounts of the serving container, by path. */}}
{{- define "kserve-vllm.serviceMounts" -}}
{{- $own := list -}}
{{- range .files }}{{ $own = append $own (dict "name" .name "mountPath" (printf "/etc/kserve-vllm/%s" .name) "readOnly" true) }}{{ end -}}
{{- include "kserve-vllm.mergeLists" (list "mountPath" $own .compiled.mounts .extraVolumeMounts) -}}
{{- end }}

{{/* Annotations of the InferenceService itself, which KServe reads; the user's win. */}}
{{- define "kserve-vllm.serviceAnnotations" -}}
{{- $own := dict "serving.kserve.io/deploymentMode" .mode -}}
{{- if .knative -}}
{{/* Knative's proxies would cut streams whose request they take for unread. */}}
{{- $_ := set $own "features.knative.dev/http-full-duplex" "Enabled" -}}
{{- else -}}
{{/* `external`: the HPA is the chart's, since KServe's own takes only cpu and memory and no pace. */}}
{{- $_ := set $own "serving.kserve.io/autoscalerClass" (ternary "external" .class (eq .class "hpa")) -}}
{{- end -}}
{{- if .tagRouting }}{{ $_ := set $own "serving.kserve.io/enable-tag-routing" "true" }}{{ end -}}
{{/* Multi-node: KServe counts GPUs by the names that it knows, and these. */}}
{{- if and .multiNode.enabled (not (has .gpu.resource (list "nvidia.com/gpu" "amd.com/gpu" "intel.com/gpu" "habana.ai/gaudi"))) -}}
{{- $_ := set $own "serving.kserve.io/gpu-resource-types" (list .gpu.resource | toJson) -}}
{{- end -}}
{{- include "kserve-vllm.mergeMaps" (list $own .annotations) -}}
{{- end }}
