{{/* Image of a flavour. Takes (list $ "cpu"|"gpu"). */}}
{{- define "kserve-vllm.image" -}}
{{- $root := index . 0 -}}
{{- $flavour := index . 1 -}}
{{- $image := $root.Values.image -}}
{{- printf "%s/%s:%s-%s" $image.registry $image.repository (default $root.Chart.AppVersion $image.tag) $flavour -}}
{{- with index $image.digests $flavour }}@{{ . }}{{ end -}}
{{- end }}

{{/* A node selector with image.architecture in it, under what is given. Takes (list $ selector). */}}
{{- define "kserve-vllm.nodeSelector" -}}
{{- $architecture := (index . 0).Values.image.architecture -}}
{{- include "kserve-vllm.mergeMaps" (list (ternary (dict "kubernetes.io/arch" $architecture) dict (ne $architecture "")) (index . 1)) -}}
{{- end }}

{{/* Where a pod of the chart's own runs, and its classes. Takes (list $ block), the block of values that has them. */}}
{{- define "kserve-vllm.placement" -}}
{{- $given := index . 1 -}}
{{- $where := dict -}}
{{- with include "kserve-vllm.nodeSelector" (list (index . 0) $given.nodeSelector) }}{{ $_ := set $where "nodeSelector" (fromYaml .) }}{{ end -}}
{{- range $name := list "priorityClassName" "runtimeClassName" }}{{ with index $given $name }}{{ $_ := set $where $name . }}{{ end }}{{ end -}}
{{- with $given.tolerations }}{{ $_ := set $where "tolerations" (include "kserve-vllm.tolerations" . | fromYamlArray) }}{{ end -}}
{{- with include "kserve-vllm.affinity" (dict "affinity" $given.affinity "gpu" (dict "products" list)) }}{{ $_ := set $where "affinity" (fromYaml .) }}{{ end -}}
{{- if $where }}{{ toYaml $where }}{{ end -}}
{{- end }}

{{/* `yes` on OpenShift, which gives out users and groups by namespace and refuses pods that name others. */}}
{{- define "kserve-vllm.openshift" -}}
{{- $platform := .Values.podSecurity.platform -}}
{{- if or (eq $platform "openshift") (and (not $platform) (.Capabilities.APIVersions.Has "security.openshift.io/v1")) }}yes{{ end -}}
{{- end }}

{{/* Not root, nothing to gain, nothing to write on. The uid is the image's. */}}
{{- define "kserve-vllm.containerSecurityContext" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
readOnlyRootFilesystem: true
runAsNonRoot: true
{{- if not (include "kserve-vllm.openshift" .) }}
runAsUser: 1000
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/*
Pod security context of the chart's own pods (Jobs, tests); a runtime cannot carry one. The group is set on all of a
volume: a pod that mounted a directory before the Job made it has left it to root.
*/}}
{{- define "kserve-vllm.podSecurityContext" -}}
{{- if not (include "kserve-vllm.openshift" .) }}
fsGroup: 1000
fsGroupChangePolicy: Always
runAsGroup: 1000
runAsUser: 1000
{{- end }}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Seconds of the startup probe: the longest load. */}}
{{- define "kserve-vllm.startupBudget" -}}
{{- $probe := .Values.runtimes.probes.startup -}}
{{- mul (int $probe.periodSeconds) (int $probe.failureThreshold) -}}
{{- end }}

{{/*
An object of the cluster. Takes a dict with $root, api, kind, namespace and name; sets `object` in it, empty where there
is none or where the cluster may not be asked.
*/}}
{{- define "kserve-vllm.lookup" -}}
{{- $object := dict -}}
{{- if .root.Values.cluster.lookup }}{{ $object = lookup .api .kind .namespace .name | default dict }}{{ end -}}
{{- $_ := set . "object" $object -}}
{{- end }}

{{/* Version of KServe as MAJOR.MINOR.PATCH, from the values or from its controller's image; empty where it is not known. */}}
{{- define "kserve-vllm.kserveVersion" -}}
{{- $version := .Values.cluster.kserveVersion -}}
{{- if not $version -}}
{{- $at := dict "root" . "api" "apps/v1" "kind" "Deployment" "namespace" .Values.cluster.kserveNamespace "name" "kserve-controller-manager" -}}
{{- include "kserve-vllm.lookup" $at -}}
{{- range dig "spec" "template" "spec" "containers" list $at.object -}}
{{- if regexMatch "kserve-controller.*:v?[0-9]+[.][0-9]+" .image }}{{ $version = regexReplaceAll "^.*:" (regexReplaceAll "@.*$" .image "") "" }}{{ end -}}
{{- end -}}
{{- end -}}
{{- regexFind "[0-9]+[.][0-9]+([.][0-9]+)?" $version -}}
{{- end }}

{{/* `yes` when a service answers 401 to who has no key. Takes the service. */}}
{{- define "kserve-vllm.asksForKeys" -}}
{{- $keys := ne .apiKeys.secretName "" -}}
{{- range .env }}{{ if eq .name "KSERVE_VLLM_API_KEY" }}{{ $keys = true }}{{ end }}{{ end -}}
{{- if $keys }}yes{{ end -}}
{{- end }}

{{/* Where the test of a service finds a key: its own variable, or the Secret of the tests. Takes (list $ service). */}}
{{- define "kserve-vllm.testKey" -}}
{{- $tests := (index . 0).Values.tests -}}
{{- $s := index . 1 -}}
{{- $own := dict -}}
{{- range $s.env }}{{ if eq .name "KSERVE_VLLM_API_KEY" }}{{ $own = .valueFrom }}{{ end }}{{ end -}}
{{- if and (not $own) $s.apiKeys.secretName $tests.apiKey.secretName -}}
{{- $own = dict "secretKeyRef" (dict "name" $tests.apiKey.secretName "key" $tests.apiKey.key) -}}
{{- end -}}
{{- if $own }}{{ toYaml $own }}{{ end -}}
{{- end }}
