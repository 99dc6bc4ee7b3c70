{{/* The runtime of another engine for one device. Takes (list $ key). The parts are those of kserve-vllm's own runtimes. */}}
{{- define "kserve-vllm.engine.runtime" -}}
{{- $root := index . 0 -}}
{{- $key := index . 1 -}}
{{- $values := $root.Values.runtimes -}}
{{- $runtime := index $root.Values.internal.runtimes $key -}}
{{- $facts := $runtime.facts -}}
apiVersion: serving.kserve.io/v1alpha1
kind: {{ ternary "ClusterServingRuntime" "ServingRuntime" (eq $values.scope "Cluster") }}
metadata:
  name: {{ include "kserve-vllm.runtimeName" (list $root $key) | quote }}
  {{- if ne $values.scope "Cluster" }}
  namespace: {{ $root.Release.Namespace | quote }}
  {{- end }}
  labels:
    {{- include "kserve-vllm.labels" (list $root) | nindent 4 }}
  {{- with include "kserve-vllm.annotations" (list $root (ternary (dict "helm.sh/resource-policy" "keep") dict $values.keepOnUpgrade)) }}
  annotations:
    {{- . | nindent 4 }}
  {{- end }}
spec:
  annotations:
    {{- include "kserve-vllm.runtime.annotations" (list $root $key) | nindent 4 }}
  labels:
    {{- include "kserve-vllm.engine.labels" (list $root $facts) | nindent 4 }}
  # Names of the engine's own: KServe never chooses it by itself, and nobody else's format collides.
  supportedModelFormats:
    - name: kserve-{{ $runtime.engine }}
      version: "1"
      autoSelect: false
    - name: huggingface
      autoSelect: false
  protocolVersions:
    {{- toYaml $facts.protocols | nindent 4 }}
  {{- with include "kserve-vllm.runtime.scheduling" (list $root $key) | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  volumes:
    {{- include "kserve-vllm.runtime.volumes" (list $root $key) | nindent 4 }}
  containers:
    - name: kserve-container
      {{- include "kserve-vllm.runtime.container" (list $root $key) | nindent 6 }}
      command:
        {{- if $facts.script }}
        - /bin/sh
        - -c
        - |
          {{- $root.Files.Get (printf "files/scripts/%s" $facts.script) | nindent 10 }}
        - {{ $facts.program }}
        {{- else }}
        {{- include "kserve-vllm.stringList" $facts.command | nindent 8 }}
        {{- end }}
      args:
        {{- $args := list }}
        {{- range $facts.args }}{{ $args = append $args (replace "HOST" $values.host .) }}{{ end }}
        {{- $args = concat $args (index $facts.deviceArgs $runtime.base | default list) $runtime.extraArgs }}
        {{- include "kserve-vllm.stringList" $args | nindent 8 }}
      env:
        {{- include "kserve-vllm.runtime.env" (list $root $key) | nindent 8 }}
      # One port: Knative takes no more. An InferenceService in Standard mode adds the others.
      ports:
        - containerPort: 8080
          protocol: TCP
      {{- range $name, $probe := $values.probes }}
      {{ $name }}Probe:
        httpGet:
          path: {{ ternary $facts.live $facts.ready (eq $name "liveness") | quote }}
          port: 8080
        periodSeconds: {{ int $probe.periodSeconds }}
        failureThreshold: {{ int $probe.failureThreshold }}
        timeoutSeconds: 5
      {{- end }}
{{- end }}

{{/* Environment of the engine: its caches are in /tmp, since the root file system is read-only. Takes (list $ key). */}}
{{- define "kserve-vllm.engine.ownEnv" -}}
{{- $root := index . 0 -}}
{{- $facts := (index $root.Values.internal.runtimes (index . 1)).facts -}}
{{- $env := dict "HOME" "/tmp" "XDG_CACHE_HOME" "/tmp/cache" "HF_HOME" "/tmp/huggingface" "TORCHINDUCTOR_CACHE_DIR" "/tmp/torchinductor" "TRITON_CACHE_DIR" "/tmp/triton" -}}
{{- if include "kserve-vllm.openshift" $root }}{{ $_ := set $env "USER" "kserve" }}{{ end -}}
{{- $host := ternary "[::]" $root.Values.runtimes.host (eq $root.Values.runtimes.host "::") -}}
{{- range $name, $value := $facts.env }}{{ $_ := set $env $name (replace "HOST" $host $value) }}{{ end -}}
{{- range $name, $value := $env }}
- name: {{ $name | quote }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* Labels of the pods. Only those of engines with metrics are found by the PodMonitor. Takes (list $ facts). */}}
{{- define "kserve-vllm.engine.labels" -}}
{{- $root := index . 0 -}}
{{- $own := dict "app.kubernetes.io/part-of" "kserve-vllm" -}}
{{- $found := dict -}}
{{- if (index . 1).metrics }}{{ $found = dict "kserve-vllm/runtimes-of" (include "kserve-vllm.runtimesOf" $root) }}{{ end -}}
{{- include "kserve-vllm.mergeMaps" (list $own $root.Values.runtimes.podLabels $found) -}}
{{- end }}
