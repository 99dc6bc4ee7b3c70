{{/* The pod that answers a file of requests. Takes (list $ job). Without the chart's version: see batchjobs.yaml. */}}
{{- define "kserve-vllm.batchPod" -}}
{{- $root := index . 0 -}}
{{- $b := index . 1 -}}
{{- $args := list (printf "/files/%s" $b.input) "--out" (printf "/files/%s" $b.output) "--concurrency" (printf "%d" (int $b.concurrency)) -}}
{{- if $b.retryFailed }}{{ $args = append $args "--retry-failed" }}{{ end -}}
{{- with $b.url }}{{ $args = concat $args (list "--url" .) }}{{ end -}}
{{- range $b.serverArgs }}{{ $args = append $args (include "kserve-vllm.string" .) }}{{ end -}}
{{- $env := concat (list (dict "name" "HOME" "value" "/tmp")) (include "kserve-vllm.outwardEnv" $root | fromJsonArray) -}}
{{- with $b.apiKey.secretName }}{{ $env = append $env (dict "name" "OPENAI_API_KEY" "valueFrom" (dict "secretKeyRef" (dict "name" . "key" $b.apiKey.key))) }}{{ end -}}
{{- $mounts := list (dict "name" "files" "mountPath" "/files") (dict "name" "tmp" "mountPath" "/tmp") -}}
{{- $volumes := list (dict "name" "files" "persistentVolumeClaim" (dict "claimName" $b.claim)) (dict "name" "tmp" "emptyDir" dict) -}}
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
  # A policy for failures, as the Job has, wants this one.
  restartPolicy: Never
  automountServiceAccountToken: false
  enableServiceLinks: false
  # What is answered is written, and a server of its own is ended.
  terminationGracePeriodSeconds: 120
  securityContext:
    {{- include "kserve-vllm.podSecurityContext" $root | trim | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- include "kserve-vllm.secretNames" . | nindent 4 }}
  {{- end }}
  {{- with include "kserve-vllm.placement" (list $root $b.job) }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
    - name: batch
      image: {{ include "kserve-vllm.image" (list $root $b.serverImage) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "kserve-vllm.containerSecurityContext" $root | nindent 8 }}
      command: [kserve-vllm, batch]
      args:
        {{- toYaml $args | nindent 8 }}
      env:
        {{- include "kserve-vllm.env" (list $env $b.job.env) | nindent 8 }}
      {{- with $b.job.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- $asked := dict "requests" (dict "cpu" $b.job.cpu "memory" $b.job.memory) "limits" (dict "memory" $b.job.memory) }}
        {{- include "kserve-vllm.quantities" (list $asked $b.job.resources) | nindent 8 }}
      volumeMounts:
        {{- include "kserve-vllm.mergeLists" (list "mountPath" $mounts $b.job.extraVolumeMounts) | nindent 8 }}
  volumes:
    {{- include "kserve-vllm.mergeLists" (list "name" $volumes $b.job.extraVolumes) | nindent 4 }}
{{- end }}

{{/* Of the Jobs for files of requests. */}}
{{- define "kserve-vllm.check.batches" -}}
{{- range $name, $b := .Values.internal.batches }}
{{- $at := printf "batchJobs.%s" $name }}
{{- if not $b.claim }}
{{ printf "%s: give the claim with the requests in claim." $at }}
{{- end }}
{{- if eq (empty $b.url) (empty $b.serverArgs) }}
{{ printf "%s: give one of url, of a server that runs, and serverArgs, for one that the Job starts." $at }}
{{- end }}
{{- if eq $b.input $b.output }}
{{ printf "%s: input and output are the same file." $at }}
{{- end }}
{{ include "kserve-vllm.check.words" (list $at "serverArgs" $b.serverArgs) }}
{{- $owned := dict "out" "output" "url" "url" "concurrency" "concurrency" "retry-failed" "retryFailed" }}
{{- range $b.serverArgs }}
{{- $word := include "kserve-vllm.string" . }}
{{- $flag := include "kserve-vllm.flag" $word }}
{{- if hasKey $owned $flag }}
{{ printf "%s: serverArgs has --%s; set %s instead." $at $flag (index $owned $flag) }}
{{- end }}
{{- if include "kserve-vllm.secretWord" $word }}
{{ printf "%s: serverArgs has --%s with a secret in plain text; give it as environment with valueFrom.secretKeyRef." $at (include "kserve-vllm.flag" $word) }}
{{- end }}
{{- end }}
{{ include "kserve-vllm.check.job" (list $ $at $b.job (list "files")) }}
{{ include "kserve-vllm.check.addresses" (list $at $b) }}
{{ include "kserve-vllm.idle.entry" (dict "root" $ "at" $at "kind" "batchJobs" "chart" "batchJobDefaults" "entry" $b) }}
{{- end }}
{{- end }}
