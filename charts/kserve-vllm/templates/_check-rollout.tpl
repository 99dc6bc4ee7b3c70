{{/* Of the rollout Jobs. */}}
{{- define "kserve-vllm.check.rollouts" -}}
{{- $root := . -}}
{{- range $name, $r := .Values.internal.rollouts }}
{{- $at := printf "rolloutJobs.%s" $name }}
{{- if not (or $r.model $r.image $r.args) }}
{{ printf "%s: say what is new: model, image or args." $at }}
{{- end }}
{{ include "kserve-vllm.check.words" (list $at "args" $r.args) }}
{{- range $r.args }}
{{- $word := include "kserve-vllm.string" . }}
{{- if not (hasPrefix "--" $word) }}
{{ printf "%s: args has %q; each is one flag with its value, as in --max-num-seqs=128." $at $word }}
{{- end }}
{{- if include "kserve-vllm.secretWord" $word }}
{{ printf "%s: args has --%s with a secret in plain text; give the service it as environment with valueFrom.secretKeyRef." $at (include "kserve-vllm.flag" $word) }}
{{- end }}
{{- end }}
{{- $last := 0 }}
{{- range $r.steps }}
{{- if le (int .) (int $last) }}
{{ printf "%s: steps have to rise, and %d comes after %d." $at (int .) (int $last) }}
{{- end }}
{{- $last = int . }}
{{- end }}
{{- if gt (int $r.threshold) (int $r.count) }}
{{ printf "%s: threshold %d cannot be reached in %d looks at a step; raise count, or lower threshold." $at (int $r.threshold) (int $r.count) }}
{{- end }}
{{- with index $root.Values.internal.services $name }}
{{ include "kserve-vllm.check.rollout" (dict "root" $root "r" $r "s" . "at" $at) }}
{{- end }}
{{- if and (not $r.serviceAccountName) (hasKey $root.Values.internal.accounts (include "kserve-vllm.rolloutName" $r)) }}
{{ printf "%s: the account that it writes would be called as serviceAccounts.%s; give that one another name, or name it in serviceAccountName." $at (include "kserve-vllm.rolloutName" $r) }}
{{- end }}
{{- $own := list }}
{{- if $r.prometheus.tokenSecret.name }}{{ $own = append $own "prometheus" }}{{ end }}
{{- if $r.answers.configMap }}{{ $own = append $own "answers" }}{{ end }}
{{ include "kserve-vllm.check.job" (list $root $at $r.job $own) }}
{{ include "kserve-vllm.check.addresses" (list $at $r) }}
{{ include "kserve-vllm.idle.entry" (dict "root" $ "at" $at "kind" "rolloutJobs" "chart" "rolloutJobDefaults" "entry" $r) }}
{{- end }}
{{- end }}

{{/* Of one whose service this release has. Takes a dict with root, r, s and at. */}}
{{- define "kserve-vllm.check.rollout" -}}
{{- $s := .s -}}
{{- $r := .r -}}
{{- $at := .at -}}
{{- if $s.canaryOn }}
{{ printf "%s: inferenceServices.%s has canary.percent, and the Job sets the percent itself; take the canary out there." $at $s.name }}
{{- end }}
{{- if $s.other }}
{{ printf "%s: a rollout is judged by kserve-vllm's metrics, and inferenceServices.%s runs %s; use its canary by hand." $at $s.name $s.facts.title }}
{{- end }}
{{- if and $r.model $s.storageUri (not (contains "://" $r.model)) (not (hasPrefix "hf://" $s.storageUri)) }}
{{ printf "%s: model %s has no scheme, and the model of inferenceServices.%s is %s; write an address with its scheme." $at $r.model $s.name $s.storageUri }}
{{- end }}
{{- if and $r.model (eq $r.model (or $s.storageUri $s.model)) (not $r.image) (not $r.args) }}
{{ printf "%s: inferenceServices.%s has this model already. After a promotion, take the rollout Job out." $at $s.name }}
{{- end }}
{{- $limit := ternary 48 41 $s.knative }}
{{- if gt (len $s.name) $limit }}
{{ printf "%s: the name may have %d characters for a rollout: KServe gives the two versions longer ones, and 63 are taken." $at $limit }}
{{- end }}
{{- if not $s.knative }}
{{- if not .root.Values.cluster.gatewayAPI }}
{{ printf "%s: in Standard mode a rollout needs KServe's Gateway API support (enableGatewayApi); set cluster.gatewayAPI when it is on, or use Knative mode." $at }}
{{- end }}
{{- $version := include "kserve-vllm.kserveVersion" .root | default "0.21" }}
{{- if semverCompare "<0.21" $version }}
{{ printf "%s: KServe %s sends no traffic to a Standard canary; upgrade KServe to 0.21 or later, or use Knative mode." $at $version }}
{{- end }}
{{- if $s.multiNode.enabled }}
{{ printf "%s: KServe has no canary for multi-node services, so that a rollout has nothing to shift." $at }}
{{- end }}
{{- if $s.fetchedAdapters }}
{{ printf "%s: KServe does not fetch adapters for a canary in Standard mode; give those of inferenceServices.%s as path." $at $s.name }}
{{- end }}
{{- end }}
{{- end }}
