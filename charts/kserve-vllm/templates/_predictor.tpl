{{/* The arguments with the canary's model in place of the service's. */}}
{{- define "kserve-vllm.canaryArgs" -}}
{{- $args := list -}}
{{- $flag := .modelFlag | default "--model" -}}
{{- $model := printf "%s=%s" $flag .model -}}
{{- $canary := printf "%s=%s" $flag .canary.model -}}
{{- range .args }}{{ $args = append $args (ternary $canary . (eq . $model)) }}{{ end -}}
{{- $args | toJson -}}
{{- end }}

{{/* The predictor. Takes (list $ service). */}}
{{- define "kserve-vllm.predictor" -}}
{{- $root := index . 0 -}}
{{- $s := index . 1 -}}
{{- $new := and $s.canaryOn $s.knative -}}
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
          serverAddress: {{ $root.Values.cluster.prometheusAddress | quote }}
          query: {{ include "kserve-vllm.kedaQuery" (list $root $s) | quote }}
        target:
          type: Value
          value: {{ $s.target | quote }}
        {{- with $s.autoscaling.kedaAuthentication }}
        {{- if .name }}
        authenticationRef:
          {{- with .mode }}
          authModes: {{ . | quote }}
          {{- end }}
          authenticationRef:
            name: {{ .name | quote }}
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
{{- with include "kserve-vllm.strings" $s.podLabels }}
labels:
  {{- . | nindent 2 }}
{{- end }}
{{- with include "kserve-vllm.predictorAnnotations" $s }}
annotations:
  {{- . | nindent 2 }}
{{- end }}
{{- include "kserve-vllm.podFields" $s | nindent 0 }}
{{- with include "kserve-vllm.serviceVolumes" $s }}
volumes:
  {{- . | nindent 2 }}
{{- end }}
{{- with $s.storageContainerName }}
storageContainerName: {{ . | quote }}
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
  runtime: {{ $s.runtimeName | quote }}
  modelFormat:
    name: {{ $s.format | quote }}
  protocolVersion: {{ if $s.other }}{{ first $s.facts.protocols }}{{ else }}v2{{ end }}
  {{- if and $s.storageUri (not $s.fetchedAdapters) }}
  storageUri: {{ ternary $s.canary.storageUri $s.storageUri $new | quote }}
  {{- end }}
  {{- if $s.storage.path }}
  storage:
    {{- with $s.storage.key }}
    key: {{ . | quote }}
    {{- end }}
    path: {{ $s.storage.path | quote }}
    {{- with include "kserve-vllm.strings" $s.storage.parameters }}
    parameters:
      {{- . | nindent 6 }}
    {{- end }}
  {{- end }}
  {{- with ternary (include "kserve-vllm.canaryArgs" $s | fromJsonArray) $s.args (and $new (ne $s.model "")) }}
  args:
    {{- include "kserve-vllm.stringList" . | nindent 4 }}
  {{- end }}
  {{- with include "kserve-vllm.serviceEnv" $s }}
  env:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with include "kserve-vllm.resources" $s }}
  resources:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with $s.startupSeconds }}
  startupProbe:
    periodSeconds: {{ min $s.startupPeriod . }}
    failureThreshold: {{ max 1 (div . (min $s.startupPeriod .)) }}
  {{- end }}
  {{- $metricsPort := int (dig "metrics" "port" 8080 $s.facts) }}
  {{- if and $s.grpc.enabled $s.knative }}
  # Knative takes one port. By this name its proxies speak HTTP/2 to it, and the runtime answers gRPC and all else there.
  ports:
    - containerPort: 8080
      name: h2c
      protocol: TCP
  {{- else if or $s.grpc.enabled (and (ne $metricsPort 8080) (not $s.knative)) }}
  # HTTP first: KServe's Service sends port 80 to the first one. A name with "grpc" makes the other one HTTP/2.
  ports:
    - containerPort: 8080
      name: http
      protocol: TCP
    {{- if $s.grpc.enabled }}
    - containerPort: 8081
      name: grpc
      protocol: TCP
    {{- end }}
    {{- if ne $metricsPort 8080 }}
    - containerPort: {{ $metricsPort }}
      name: metrics
      protocol: TCP
    {{- end }}
  {{- end }}
  {{- if and $s.other (not $s.knative) $s.drainDelay }}
  # The engine has no delay of its own: new requests still come until every proxy knows that the pod leaves.
  lifecycle:
    preStop:
      sleep:
        seconds: {{ $s.drainDelay }}
  {{- end }}
  {{- with $s.envFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "kserve-vllm.serviceMounts" $s }}
  volumeMounts:
    {{- . | nindent 4 }}
  {{- end }}
{{- if $s.multiNode.enabled }}
workerSpec:
  pipelineParallelSize: {{ int $s.parallelism.pipeline }}
  tensorParallelSize: {{ int $s.parallelism.tensor }}
  terminationGracePeriodSeconds: {{ int $s.grace }}
  {{- include "kserve-vllm.podFields" $s | nindent 2 }}
  {{- with include "kserve-vllm.serviceVolumes" (dict "sharedMemory" $s.sharedMemory "tmpSizeLimit" $s.tmpSizeLimit "files" list "compiled" $s.compiled "extraVolumes" $s.extraVolumes) }}
  volumes:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: worker-container
      {{- with $s.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with include "kserve-vllm.mergeLists" (list "mountPath" $s.compiled.mounts $s.extraVolumeMounts) }}
      volumeMounts:
        {{- . | nindent 8 }}
      {{- end }}
      args:
        {{- include "kserve-vllm.stringList" $s.engineArgs | nindent 8 }}
      {{- with include "kserve-vllm.env" (list $s.compiled.env $s.env) }}
      env:
        {{- . | nindent 8 }}
      {{- end }}
      {{- with include "kserve-vllm.resources" $s }}
      resources:
        {{- . | nindent 8 }}
      {{- end }}
{{- end }}
{{- end }}
