{{/* The pod that fills a claim with a model. Takes (list $ cache). Without the chart's version: see jobs.yaml. */}}
{{- define "kserve-vllm.fillPod" -}}
{{- $root := index . 0 -}}
{{- $c := index . 1 -}}
{{- $hub := $c.huggingFace -}}
{{- $source := dict "directory" $c.directory "files" $c.files "repository" $hub.repository "revision" $hub.revision "endpoint" $hub.endpoint "exclude" $hub.exclude -}}
{{- $env := concat (list (dict "name" "HOME" "value" "/tmp")) (include "kserve-vllm.outwardEnv" $root | fromJsonArray) -}}
{{- with $hub.tokenSecret.name }}{{ $env = append $env (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" . "key" $hub.tokenSecret.key))) }}{{ end -}}
{{- $mounts := list (dict "name" "models" "mountPath" "/models") (dict "name" "tmp" "mountPath" "/tmp") -}}
{{- $volumes := list (dict "name" "models" "persistentVolumeClaim" (dict "claimName" (default $c.name $c.claim.existing))) (dict "name" "tmp" "emptyDir" dict) -}}
{{- $ca := include "kserve-vllm.caFile" $root | fromJson -}}
{{- if $ca -}}
{{- $mounts = append $mounts (dict "name" "ca" "mountPath" "/etc/kserve-vllm/ca" "readOnly" true) -}}
{{- $volumes = append $volumes (include "kserve-vllm.fileVolume" $ca | fromJson) -}}
{{- end -}}
metadata:
  labels:
    {{- include "kserve-vllm.stableLabels" (list $root) | nindent 4 }}
  annotations:
    {{- include "kserve-vllm.annotations" (list $root (dict "sidecar.istio.io/inject" "false")) | nindent 4 }}
spec:
  restartPolicy: OnFailure
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext:
    {{- include "kserve-vllm.podSecurityContext" $root | trim | nindent 4 }}
  {{- with $c.job.initContainers }}
  initContainers:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- include "kserve-vllm.secretNames" . | nindent 4 }}
  {{- end }}
  {{- with include "kserve-vllm.nodeSelector" (list $root $c.job.nodeSelector) }}
  nodeSelector:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with $c.job.tolerations }}
  tolerations:
    {{- include "kserve-vllm.tolerations" . | nindent 4 }}
  {{- end }}
  containers:
    - name: fill
      image: {{ include "kserve-vllm.image" (list $root "cpu") }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "kserve-vllm.containerSecurityContext" $root | nindent 8 }}
      command:
        - python3
        - -c
        - |
          {{- $root.Files.Get "files/scripts/fill_cache.py" | nindent 10 }}
      args:
        - {{ $source | toJson | quote }}
      env:
        {{- include "kserve-vllm.env" (list $env $c.job.env) | nindent 8 }}
      {{- with $c.job.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- $asked := dict "requests" (dict "cpu" $c.job.cpu "memory" $c.job.memory) "limits" (dict "memory" $c.job.memory) }}
        {{- include "kserve-vllm.quantities" (list $asked $c.job.resources) | nindent 8 }}
      volumeMounts:
        {{- include "kserve-vllm.mergeLists" (list "mountPath" $mounts $c.job.extraVolumeMounts) | nindent 8 }}
  volumes:
    {{- include "kserve-vllm.mergeLists" (list "name" $volumes $c.job.extraVolumes) | nindent 4 }}
{{- end }}
