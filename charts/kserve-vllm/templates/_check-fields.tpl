{{/*
Of what values hand on in Kubernetes' own terms: fields that KServe or the API server would drop or refuse, lists that name
something twice, mounts of no volume. files/fields.json has the fields, by the names of the values.
*/}}

{{/* Takes (list $ at entry), where the entry has some of these values. */}}
{{- define "kserve-vllm.check.kubernetes" -}}
{{- $root := index . 0 -}}
{{- $at := index . 1 -}}
{{- $entry := index . 2 -}}
{{- range $list, $key := dict "extraVolumes" "name" "extraVolumeMounts" "mountPath" }}
{{ include "kserve-vllm.check.twice" (list $at $list $key (index $entry $list | default list)) }}
{{- end }}
{{- range $entry.initContainers }}
{{- if has .name (ternary (list "fill" "build") (list "kserve-container" "worker-container" "queue-proxy") (hasPrefix "modelCaches." $at)) }}
{{ printf "%s: initContainers has %s, as another container of the pod is called; give it another name." $at .name }}
{{- end }}
{{- end }}
{{- if $root.Values.cluster.checkFields }}
{{- $known := $root.Values.internal.fields }}
{{- range $name, $node := $known.roots }}
{{- with index $entry $name }}
{{ include "kserve-vllm.check.field" (list $known.nodes $node (printf "%s.%s" $at $name) .) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The kind of a value, as OpenAPI calls it. */}}
{{- define "kserve-vllm.kind" -}}
{{- if kindIs "map" . }}object{{ else if kindIs "slice" . }}array{{ else if kindIs "bool" . }}boolean{{ else if kindIs "string" . }}string{{ else if eq (float64 (int64 .)) (float64 .) }}integer{{ else }}number{{ end -}}
{{- end }}

{{/* Of one value and all below it. Takes (list nodes index at value). Null is no field. */}}
{{- define "kserve-vllm.check.field" -}}
{{- $nodes := index . 0 -}}
{{- $node := index $nodes (index . 1 | int) -}}
{{- $at := index . 2 -}}
{{- $value := index . 3 -}}
{{- if not (kindIs "invalid" $value) }}
{{- $kind := include "kserve-vllm.kind" $value }}
{{- if not (has $kind $node.types) }}
{{ printf "%s: Kubernetes asks for type %s here, and this is of type %s%s." $at (join " or " $node.types) $kind (ternary "; put it into quotes" "" (and (has "string" $node.types) (not (has $kind (list "object" "array"))))) }}
{{- else if eq $kind "array" }}
{{- range $index, $item := $value }}
{{- include "kserve-vllm.check.field" (list $nodes $node.items (printf "%s[%d]" $at $index) $item) }}
{{- end }}
{{- else if and (eq $kind "object") (hasKey $node "each") }}
{{- range $key, $child := $value }}
{{- include "kserve-vllm.check.field" (list $nodes $node.each (printf "%s.%s" $at $key) $child) }}
{{- end }}
{{- else if and (eq $kind "object") (hasKey $node "fields") }}
{{- range $key, $child := $value }}
{{- if hasKey $node.fields $key }}
{{- include "kserve-vllm.check.field" (list $nodes (index $node.fields $key) (printf "%s.%s" $at $key) $child) }}
{{- else }}
{{ printf "%s: Kubernetes has no field %s here, but %s. (Where the cluster knows it: cluster.checkFields false.)" $at $key (keys $node.fields | sortAlpha | join ", ") }}
{{- end }}
{{- end }}
{{- range $node.required }}
{{- if kindIs "invalid" (index $value .) }}
{{ printf "%s: the field %s is missing." $at . }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/*
Of mounts. Takes a dict with at, volumes (names that are there) and entry (with extraVolumes, extraVolumeMounts and
initContainers, of which any may be missing).
*/}}
{{- define "kserve-vllm.check.mounts" -}}
{{- $at := .at -}}
{{- $there := .volumes -}}
{{- range .entry.extraVolumes }}{{ $there = append $there .name }}{{ end -}}
{{- $mounts := dict "extraVolumeMounts" (default list .entry.extraVolumeMounts) -}}
{{- range .entry.initContainers }}{{ $_ := set $mounts (printf "initContainers.%s" .name) (default list .volumeMounts) }}{{ end -}}
{{- range $place, $list := $mounts }}
{{- range $list }}
{{- $name := toString .name }}
{{- if and (not (has $name $there)) (not (hasPrefix "kserve-" $name)) }}
{{ printf "%s: %s mounts the volume %s, and there is none of that name; add it to extraVolumes (there are: %s)." $at $place $name ($there | uniq | sortAlpha | join ", ") }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The same of a service, whose pods also have its runtime's volumes. Takes (list $ service at). */}}
{{- define "kserve-vllm.check.serviceMounts" -}}
{{- $s := index . 1 -}}
{{- $runtimes := (index . 0).Values.internal.runtimes -}}
{{- $runtime := ternary (index $runtimes (printf "extra.%s" $s.runtime)) (index $runtimes $s.kind) (ne $s.runtime "") -}}
{{- $there := list "tmp" "shm" }}
{{- range concat ($runtime.extraVolumes | default list) $s.compiled.volumes }}{{ $there = append $there .name }}{{ end }}
{{/* Workers have none of the files of the front end. */}}
{{- if not $s.multiNode.enabled }}{{ range $s.files }}{{ $there = append $there .name }}{{ end }}{{ end }}
{{/* The volumes of another release's runtime are not known. */}}
{{- if $runtime }}
{{ include "kserve-vllm.check.mounts" (dict "at" (index . 2) "volumes" $there "entry" $s) }}
{{- end }}
{{- if $s.knative }}
{{- range concat ($runtime.extraVolumes | default list) $s.extraVolumes }}
{{- $taken := pick . "configMap" "csi" "emptyDir" "ephemeral" "hostPath" "image" "persistentVolumeClaim" "projected" "secret" }}
{{- if not $taken }}
{{ printf "%s: the volume %s is of a kind (%s) that Knative refuses; set deploymentMode: Standard, or take its files from a claim." (index $ 2) .name (keys (omit . "name") | join ", ") }}
{{- end }}
{{- end }}
{{- end }}
{{- range $s.extraVolumeMounts }}
{{- if and $s.stored (not $s.fetchedAdapters) (eq (trimSuffix "/" .mountPath) "/mnt/models") }}
{{ printf "%s: extraVolumeMounts mounts %s at /mnt/models, where KServe mounts the model; take another path." (index $ 2) .name }}
{{- end }}
{{- end }}
{{- end }}

{{/* Of extraObjects, whose fields are not known. Takes their texts; one may hold several, or none. */}}
{{- define "kserve-vllm.check.extraObjects" -}}
{{- $seen := list -}}
{{- range $index, $text := . }}
{{- $at := printf "extraObjects[%d]" $index }}
{{- range regexSplit "(?m)^---.*$" $text -1 }}
{{- $object := fromYaml . }}
{{- $metadata := default dict $object.metadata }}
{{- $name := default "" $metadata.name }}
{{- if hasKey $object "Error" }}
{{ printf "%s: it is no object in YAML: %s." $at $object.Error }}
{{- else if and $object (not (and $object.apiVersion $object.kind (or $object.items $name $metadata.generateName))) }}
{{ printf "%s: an object has apiVersion, kind and metadata.name; this one has %s." $at (keys $object | sortAlpha | join ", ") }}
{{- else if $object }}
{{- $key := printf "%s %s/%s" $object.kind (default "" $metadata.namespace) $name }}
{{- if and $name (has $key $seen) }}
{{ printf "%s: %s is there twice; take one out." $at $key }}
{{- end }}
{{- $seen = append $seen $key }}
{{- range $group := list "labels" "annotations" }}
{{- range $label, $value := default dict (index $metadata $group) }}
{{- if not (kindIs "string" $value) }}
{{ printf "%s: metadata.%s.%s is no text; put it into quotes." $at $group $label }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
