{{/* The arguments with the canary's model in place of the service's. */}}
{{- define "kserve-vllm.canaryArgs" -}}
{{- $args := list -}}
{{- $model := printf "--model=%s" .model -}}
{{- $canary := printf "--model=%s" .canary.model -}}
{{- range .args }}{{ $args = append $args (ternary $canary . (eq . $model)) }}{{ end -}}
{{- $args | toJson -}}
{{- end }}

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
{{- if $affinity }}{{ toYaml $affinity }}{{ end -}}
{{- end }}

{{/* CPU, memory and GPUs. A limit given alone is the request too: the runtime's request may be above it. */}}
{{- define "kserve-vllm.resources" -}}
{{- $requests := mergeOverwrite (deepCopy .resources.limits) .resources.requests -}}
{{- $limits := deepCopy .resources.limits -}}
{{- if gt (int .gpus) 0 -}}
{{- $requests = set $requests .gpu.resource (int .gpus | toString) -}}
{{- $limits = set $limits .gpu.resource (int .gpus | toString) -}}
{{- end -}}
{{- $out := dict -}}
{{- if $requests }}{{ $out = set $out "requests" $requests }}{{ end -}}
{{- if $limits }}{{ $out = set $out "limits" $limits }}{{ end -}}
{{- if $out }}{{ toYaml $out }}{{ end -}}
{{- end }}

{{/* Pod fields that a runtime cannot carry, for head and workers alike. */}}
{{- define "kserve-vllm.podFields" -}}
# KServe would otherwise leave it to its configuration.
automountServiceAccountToken: false
# A Service named kserve-vllm would turn into environment that looks like settings of the runtime.
enableServiceLinks: false
{{- with .serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "kserve-vllm.affinity" . }}
affinity:
  {{- . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Annotations of the pods or, in Knative, of the revision. */}}
{{- define "kserve-vllm.predictorAnnotations" -}}
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
{{- with .annotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The question that KEDA puts to Prometheus. The answer over the target is the number of pods, so a mean or a
quantile is multiplied by the number of pods that report. */}}
{{- define "kserve-vllm.kedaQuery" -}}
{{- $root := index . 0 -}}
{{- $s := index . 1 -}}
{{- $selector := printf "{namespace=%q,pod=~%q}" $root.Release.Namespace (printf "%s-.+" (include "kserve-vllm.predictorName" $s.name)) -}}
{{- if eq $s.metric "queue-depth" -}}
sum(vllm:num_requests_waiting{{ $selector }})
{{- else if eq $s.metric "kv-cache" -}}
sum(avg by (pod) (vllm:kv_cache_usage_perc{{ $selector }}))
{{- else -}}
(histogram_quantile(0.99, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket{{ $selector }}[2m]))) > 0) * on() count(count by (pod) (vllm:num_requests_running{{ $selector }})) or on() vector(0)
{{- end -}}
{{- end }}

{{/* The predictor. Takes (list $ service). */}}
{{- define "kserve-vllm.predictor" -}}
{{- $root := index . 0 -}}
{{- $s := index . 1 -}}
{{- $canary := not (kindIs "invalid" $s.canary.percent) -}}
{{- $new := and $canary $s.knative -}}
minReplicas: {{ int $s.min }}
maxReplicas: {{ int $s.max }}
{{- if $s.knative }}
scaleMetric: {{ $s.metric }}
scaleTarget: {{ int $s.target }}
{{- with $s.autoscaling.knative.containerConcurrency }}
containerConcurrency: {{ int . }}
{{- end }}
{{- else if eq $s.class "keda" }}
autoScaling:
  metrics:
    - type: External
      external:
        metric:
          backend: prometheus
          serverAddress: {{ $root.Values.cluster.prometheusAddress }}
          query: {{ include "kserve-vllm.kedaQuery" (list $root $s) | quote }}
        target:
          type: Value
          value: {{ $s.target | quote }}
        {{- with $s.autoscaling.kedaAuthentication }}
        {{- if .name }}
        authenticationRef:
          {{- with .mode }}
          authModes: {{ . }}
          {{- end }}
          authenticationRef:
            name: {{ .name }}
        {{- end }}
        {{- end }}
  {{- with include "kserve-vllm.scalingBehaviour" $s | trim }}
  behavior:
    {{- . | nindent 4 }}
  {{- end }}
{{- end }}
timeout: {{ int $s.timeout }}
{{- if $new }}
canaryTrafficPercent: {{ int $s.canary.percent }}
{{- end }}
{{- if not $s.knative }}
terminationGracePeriodSeconds: {{ int $s.grace }}
{{- end }}
{{- if $s.rollout }}
deploymentStrategy:
  type: RollingUpdate
  rollingUpdate:
    maxSurge: {{ ternary 1 0 (eq $s.rollout "surge") }}
    maxUnavailable: {{ ternary 0 1 (eq $s.rollout "surge") }}
{{- end }}
{{- with include "kserve-vllm.predictorAnnotations" $s | trim }}
annotations:
  {{- . | nindent 2 }}
{{- end }}
{{- include "kserve-vllm.podFields" $s | nindent 0 }}
{{- if or $s.files $s.sharedMemory }}
volumes:
  {{- with $s.sharedMemory }}
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ . }}
  {{- end }}
  {{- range $s.files }}
  - name: {{ .name }}
    {{- if .secret }}
    secret:
      secretName: {{ .secret }}
    {{- else }}
    configMap:
      name: {{ .configMap }}
    {{- end }}
  {{- end }}
{{- end }}
{{- if $s.fetchedAdapters }}
storageUris:
  - uri: {{ ternary $s.canary.storageUri $s.storageUri $new | quote }}
    mountPath: /mnt/models/base
  {{- range $s.fetchedAdapters }}
  - uri: {{ .storageUri | quote }}
    mountPath: /mnt/models/adapters/{{ .name }}
  {{- end }}
{{- end }}
model:
  runtime: {{ $s.runtimeName }}
  modelFormat:
    name: {{ $s.format }}
  protocolVersion: v2
  {{- if and $s.storageUri (not $s.fetchedAdapters) }}
  storageUri: {{ ternary $s.canary.storageUri $s.storageUri $new | quote }}
  {{- end }}
  args:
    {{- if and $new $s.model }}
    {{- include "kserve-vllm.stringList" (include "kserve-vllm.canaryArgs" $s | fromJsonArray) | nindent 4 }}
    {{- else }}
    {{- include "kserve-vllm.stringList" $s.args | nindent 4 }}
    {{- end }}
  {{- if or $s.env $s.huggingFaceToken.secretName $s.sharing.redis.secret }}
  env:
    {{- with $s.sharing.redis.secret }}
    - name: KSERVE_VLLM_REDIS_URL
      valueFrom:
        secretKeyRef:
          name: {{ . }}
          key: {{ $s.sharing.redis.key }}
    {{- end }}
    {{- with $s.huggingFaceToken.secretName }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef:
          name: {{ . }}
          key: {{ $s.huggingFaceToken.key }}
    {{- end }}
    {{- with $s.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  {{- with include "kserve-vllm.resources" $s }}
  resources:
    {{- . | nindent 4 }}
  {{- end }}
  {{- if $s.grpc.enabled }}
  # HTTP first: KServe's Service sends port 80 to the first one. A name with "grpc" makes the other one HTTP/2.
  ports:
    - containerPort: 8080
      name: http
      protocol: TCP
    - containerPort: 8081
      name: grpc
      protocol: TCP
  {{- end }}
  {{- with $s.files }}
  volumeMounts:
    {{- range . }}
    - name: {{ .name }}
      mountPath: /etc/kserve-vllm/{{ .name }}
      readOnly: true
    {{- end }}
  {{- end }}
{{- if $s.multiNode.enabled }}
workerSpec:
  pipelineParallelSize: {{ int $s.parallelism.pipeline }}
  tensorParallelSize: {{ int $s.parallelism.tensor }}
  terminationGracePeriodSeconds: {{ int $s.grace }}
  {{- include "kserve-vllm.podFields" $s | nindent 2 }}
  {{- with $s.sharedMemory }}
  volumes:
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ . }}
  {{- end }}
  containers:
    - name: worker-container
      args:
        {{- include "kserve-vllm.stringList" $s.engineArgs | nindent 8 }}
      {{- with $s.env }}
      env:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with include "kserve-vllm.resources" $s }}
      resources:
        {{- . | nindent 8 }}
      {{- end }}
{{- end }}
{{- end }}

{{- define "kserve-vllm.scalingBehaviour" -}}
{{- with .autoscaling.stabilization -}}
{{- if not (kindIs "invalid" .scaleUpSeconds) }}
scaleUp:
  stabilizationWindowSeconds: {{ int .scaleUpSeconds }}
{{- end }}
{{- if not (kindIs "invalid" .scaleDownSeconds) }}
scaleDown:
  stabilizationWindowSeconds: {{ int .scaleDownSeconds }}
{{- end }}
{{- end -}}
{{- end }}
