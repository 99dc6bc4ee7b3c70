{{/*
Every template begins with it: the values are made whole once, and `.Values.internal` holds what is worked out of them.

- Names of an earlier version are moved to what they are called now.
- What is missing or null becomes the chart's default, also where Helm has taken a key out or keeps the values of an
  earlier chart (--reuse-values). Numbers become text where the default is text.
- Entries that are null or have `enabled: false` are left out. The others are laid over their defaults.

`.Values.internal`: defaults (the chart's own), fields (what Kubernetes knows, see _check-fields.tpl), renamed (sentences for NOTES), misnamed (sentences that end the render), inherited (values from global),
services, routes, caches, batches, rollouts, accounts and extras (entries by name; services also with what _service.tpl derives), runtimes (all
of them by key: cpu, gpu, multinode, extra.NAME, engine.NAME.DEVICE; each with its base), engines (what is known of each) and
engineRuntimes (those that are written).
*/}}
{{- define "kserve-vllm.load" -}}
{{- if not (hasKey .Values "internal") -}}
{{- $defaults := .Files.Get "files/defaults.json" | fromJson -}}
{{- $internal := dict "defaults" $defaults "renamed" list "misnamed" list "inherited" list "fields" (.Files.Get "files/fields.json" | fromJson) -}}
{{- include "kserve-vllm.load.names" (list . $internal) -}}
{{- include "kserve-vllm.complete" (list .Values $defaults) -}}
{{- $_ := set .Values "internal" $internal -}}
{{- include "kserve-vllm.load.global" . -}}
{{- $kinds := dict "services" (list "inferenceServices" "inferenceServiceDefaults") "routes" (list "routes" "routeDefaults") "caches" (list "modelCaches" "modelCacheDefaults") "batches" (list "batchJobs" "batchJobDefaults") "rollouts" (list "rolloutJobs" "rolloutJobDefaults") "accounts" (list "serviceAccounts" "serviceAccountDefaults") "extras" (list "runtimes.extra" "extraRuntimeDefaults") -}}
{{- range $kind, $keys := $kinds -}}
{{- $entries := dict -}}
{{- $given := dict "in" $.Values "path" (first $keys) -}}
{{- include "kserve-vllm.get" $given -}}
{{- range $name, $own := $given.value -}}
{{- if kindIs "map" $own -}}
{{- $entry := deepCopy (index $.Values (last $keys)) -}}
{{- include "kserve-vllm.overlay" (list $entry $own (index $defaults (last $keys))) -}}
{{- if $entry.enabled }}{{ $_ := set $entries $name (set $entry "name" $name) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $_ := set $internal $kind $entries -}}
{{- end -}}
{{- $runtimes := dict -}}
{{- range list "cpu" "gpu" "multinode" }}{{ $_ := set $runtimes . (set (index $.Values.runtimes .) "base" .) }}{{ end -}}
{{- range $name, $extra := $internal.extras }}{{ $_ := set $runtimes (printf "extra.%s" $name) $extra }}{{ end -}}
{{- $_ := set $internal "runtimes" $runtimes -}}
{{- include "kserve-vllm.load.engines" (list $ $internal) -}}
{{- range $internal.services }}{{ include "kserve-vllm.service" (list $ .) }}{{ end -}}
{{- include "kserve-vllm.load.engineRuntimes" $ -}}
{{/* Where a route leads to, the default last: it matches everything. */}}
{{- range $internal.routes }}{{ $_ := set . "targets" (append .headerRoutes (dict "inferenceService" .inferenceService)) }}{{ end -}}
{{- end -}}
{{- end }}

{{/* What a parent chart says of images to all its charts, under what this one's own values say. */}}
{{- define "kserve-vllm.load.global" -}}
{{- $global := default dict .Values.global -}}
{{- with $global.imageRegistry -}}
{{- if eq $.Values.image.registry $.Values.internal.defaults.image.registry -}}
{{- $_ := set $.Values.image "registry" . -}}
{{- $_ := set $.Values.internal "inherited" (append $.Values.internal.inherited "image.registry") -}}
{{- end -}}
{{- end -}}
{{- if not .Values.image.pullSecrets -}}
{{- $names := list -}}
{{- range $global.imagePullSecrets }}{{ $names = append $names (ternary (get (ternary . dict (kindIs "map" .)) "name") . (kindIs "map" .)) }}{{ end -}}
{{- $_ := set .Values.image "pullSecrets" $names -}}
{{- $_ := set .Values.internal "inherited" (append .Values.internal.inherited "image.pullSecrets") -}}
{{- end -}}
{{- end }}

{{/* Move old names and collect wrong ones, everywhere. Takes (list $ internal). */}}
{{- define "kserve-vllm.load.names" -}}
{{- $root := index . 0 -}}
{{- $internal := index . 1 -}}
{{- $names := $root.Files.Get "files/names.yaml" | fromYaml -}}
{{- range $top := concat (keys $names.renamed) (keys $names.instead) | uniq | sortAlpha -}}
{{- $places := dict $top (index $root.Values $top) -}}
{{- if hasSuffix "Defaults" $top -}}
{{- $entries := printf "%ss" (trimSuffix "Defaults" $top) -}}
{{- range $name, $entry := default dict (index $root.Values $entries) -}}
{{- $_ := set $places (printf "%s.%s" $entries $name) $entry -}}
{{- end -}}
{{- end -}}
{{- range $at, $values := $places -}}
{{- if kindIs "map" $values -}}
{{- range $old, $new := default dict (index $names.renamed $top) -}}
{{- $from := dict "in" $values "path" $old -}}
{{- include "kserve-vllm.get" $from -}}
{{- if $from.found -}}
{{- $to := dict "in" $values "path" $new -}}
{{- include "kserve-vllm.get" $to -}}
{{- $default := dict "in" (index $internal.defaults $top) "path" $new -}}
{{- include "kserve-vllm.get" $default -}}
{{- if and $to.found (ne (toJson $to.value) (toJson $default.value)) -}}
{{- $_ := set $internal "misnamed" (append $internal.misnamed (printf "%s: %s is the earlier name of %s, and both are given; take %s out." $at $old $new $old)) -}}
{{- else -}}
{{- include "kserve-vllm.put" (dict "in" $values "path" $new "value" $from.value) -}}
{{- $_ := set $internal "renamed" (append $internal.renamed (printf "%s.%s is now called %s" $at $old $new)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $wrong, $right := default dict (index $names.instead $top) -}}
{{- $from := dict "in" $values "path" $wrong -}}
{{- include "kserve-vllm.get" $from -}}
{{- if $from.found -}}
{{- $_ := set $internal "misnamed" (append $internal.misnamed (printf "%s: there is no %s; write %s." $at $wrong $right)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Look a dotted path up. Takes a dict with `in` and `path`; sets `found` and `value` in it. Null counts as absent. */}}
{{- define "kserve-vllm.get" -}}
{{- $node := .in -}}
{{- range splitList "." .path -}}
{{- if kindIs "map" $node }}{{ $node = index $node . }}{{ else }}{{ $node = (dict).nothing }}{{ end -}}
{{- end -}}
{{- $_ := set . "value" $node -}}
{{- $_ := set . "found" (not (kindIs "invalid" $node)) -}}
{{- end }}

{{/* Set a dotted path. Takes a dict with `in`, `path` and `value`. */}}
{{- define "kserve-vllm.put" -}}
{{- $node := .in -}}
{{- $parts := splitList "." .path -}}
{{- range initial $parts -}}
{{- if not (kindIs "map" (index $node .)) }}{{ $_ := set $node . dict }}{{ end -}}
{{- $node = index $node . -}}
{{- end -}}
{{- $_ := set $node (last $parts) .value -}}
{{- end }}

{{/* Fill what is missing or null. Takes (list values defaults). Labels are whole: a label that is taken out stays out. */}}
{{- define "kserve-vllm.complete" -}}
{{- $values := index . 0 -}}
{{- range $key, $default := index . 1 -}}
{{- $value := index $values $key -}}
{{- if or (not (hasKey $values $key)) (kindIs "invalid" $value) -}}
{{- if not (kindIs "invalid" $default) }}{{ $_ := set $values $key (deepCopy $default) }}{{ else }}{{ $_ := set $values $key nil }}{{ end -}}
{{- else if and (kindIs "map" $value) (kindIs "map" $default) (ne $key "labels") -}}
{{- include "kserve-vllm.complete" (list $value $default) -}}
{{- else if and (kindIs "string" $default) (not (kindIs "string" $value)) -}}
{{- $_ := set $values $key (include "kserve-vllm.string" $value) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/*
Lay an entry over its defaults, in place. Takes (list into entry defaults-of-the-chart). Null gives a value of the chart
back its own default, and takes a key out of a free map such as nodeSelector.
*/}}
{{- define "kserve-vllm.overlay" -}}
{{- $into := index . 0 -}}
{{- $chart := index . 2 | default dict -}}
{{- range $key, $value := index . 1 -}}
{{- $default := index $chart $key -}}
{{- if kindIs "invalid" $value -}}
{{- if hasKey $chart $key -}}
{{- if kindIs "invalid" $default }}{{ $_ := set $into $key nil }}{{ else }}{{ $_ := set $into $key (deepCopy $default) }}{{ end -}}
{{- else }}{{ $_ := unset $into $key }}{{ end -}}
{{- else if and (kindIs "map" $value) (kindIs "map" (index $into $key)) -}}
{{- include "kserve-vllm.overlay" (list (index $into $key) $value (ternary $default dict (kindIs "map" $default))) -}}
{{- else if and (kindIs "string" $default) (not (kindIs "string" $value)) -}}
{{- $_ := set $into $key (include "kserve-vllm.string" $value) -}}
{{- else -}}
{{- $_ := set $into $key $value -}}
{{- end -}}
{{- end -}}
{{- end }}
