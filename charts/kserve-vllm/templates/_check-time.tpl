{{/* Of time: timeouts, grace, deadlines. */}}
{{- define "kserve-vllm.check.time" -}}
{{- $root := .root -}}
{{- $s := .s -}}
{{- $at := .at -}}
{{- if and $s.knative (gt (int $s.timeout) (int $root.Values.cluster.maxRevisionTimeoutSeconds)) }}
{{ printf "%s: timeoutSeconds is %d, but Knative refuses more than the cluster's max-revision-timeout-seconds of %d. Raise it in config-defaults and in cluster.maxRevisionTimeoutSeconds, or use Standard mode." $at (int $s.timeout) (int $root.Values.cluster.maxRevisionTimeoutSeconds) }}
{{- end }}
{{- if gt (add (int $s.drainTimeout) (int $s.drainDelay)) (int $s.grace) }}
{{ printf "%s: the drain takes %d s (delay %d, timeout %d), but the pod is killed after %d s; raise %s or shorten the drain." $at (add (int $s.drainTimeout) (int $s.drainDelay)) (int $s.drainDelay) (int $s.drainTimeout) (int $s.grace) (ternary "timeoutSeconds" "terminationGracePeriodSeconds" $s.knative) }}
{{- end }}
{{- if and $s.knative (lt (int $s.progressDeadline) (int $s.startupBudget)) }}
{{ printf "%s: Knative would give up after %d s, while the startup probe still allows %d s; raise progressDeadlineSeconds or lower startupSeconds." $at (int $s.progressDeadline) (int $s.startupBudget) }}
{{- end }}

{{- if and $s.knative (eq (toJson $s.autoscaling.knative.initialScale) "0") }}
{{- $config := dict "root" $root "api" "v1" "kind" "ConfigMap" "namespace" $root.Values.cluster.knativeNamespace "name" "config-autoscaler" }}
{{- include "kserve-vllm.lookup" $config }}
{{- if and $config.object (ne (dig "data" "allow-zero-initial-scale" "false" $config.object) "true") }}
{{ printf "%s: Knative refuses autoscaling.knative.initialScale 0 unless allow-zero-initial-scale is true in its config-autoscaler; set it there, or leave initialScale empty." $at }}
{{- end }}
{{- end }}
{{- if and $s.rollout $s.multiNode.enabled }}
{{ printf "%s: KServe replaces all nodes of a multiNode service at once; leave rollout empty." $at }}
{{- end }}
{{- $found := dict "root" $root "api" "serving.kserve.io/v1beta1" "kind" "InferenceService" "namespace" $root.Release.Namespace "name" $s.name }}
{{- include "kserve-vllm.lookup" $found }}
{{- $mode := dig "metadata" "annotations" "serving.kserve.io/deploymentMode" $s.mode $found.object }}
{{- $mode = index (dict "Serverless" "Knative" "RawDeployment" "Standard") $mode | default $mode }}
{{- if ne $mode $s.mode }}
{{ printf "%s: it is there in %s mode, and KServe does not let the mode change. Delete the InferenceService first, or write this one under another name." $at $mode }}
{{- end }}
{{- end }}
