{{/* The groups of a file of rules with what the values change. Takes (list $ path). */}}
{{- define "kserve-vllm.ruleGroups" -}}
{{- $root := index . 0 -}}
{{- $settings := $root.Values.monitoring.prometheusRule -}}
{{- $text := $root.Files.Get (index . 1) -}}
{{/* The burn-rate alerts compare with a factor of the error budget, which is 0.001 and 0.01 in the files. */}}
{{- range $budget, $mark := dict "0.001" "AVAILABILITY" "0.01" "FIRST_TOKEN" -}}
{{- $text = regexReplaceAll (printf "[*] %s( |\\)|\n)" (replace "." "[.]" $budget)) $text (printf "* %s${1}" $mark) -}}
{{- end -}}
{{- range $mark, $objective := dict "AVAILABILITY" $settings.availability "FIRST_TOKEN" $settings.firstToken -}}
{{- $budget := round (subf 1 $objective) 9 -}}
{{/* No more than all can fail: with a large budget nine in ten are enough. */}}
{{- range $factor := list "14.4" "6" "3" -}}
{{- if gt (mulf $budget (float64 $factor)) 0.9 }}{{ $text = replace (printf "> %s * %s" $factor $mark) "> 0.9" $text }}{{ end -}}
{{- end -}}
{{- $text = replace (printf "* %s" $mark) (printf "* %v" $budget) $text -}}
{{- end -}}
{{- $seconds := float64 $settings.firstTokenSeconds -}}
{{- if ne $seconds 0.5 -}}
{{/* The boundary of a bucket as Prometheus' client writes it: 1.0, 2.5. */}}
{{- $boundary := ternary (printf "%.1f" $seconds) (printf "%v" $seconds) (eq (floor $seconds) $seconds) -}}
{{- $text = replace "le=\"0.5\"" (printf "le=%q" $boundary) $text | replace "500 ms" (printf "%v s" $seconds) -}}
{{- end -}}
{{- $groups := list -}}
{{- range ($text | fromYaml).groups -}}
{{- $rules := list -}}
{{- range $rule := .rules -}}
{{- $change := dict -}}
{{- if $rule.alert }}{{ $change = index $settings.alerts $rule.alert | default dict }}{{ end -}}
{{- if not (kindIs "invalid" $change.for) }}{{ $_ := set $rule "for" (ternary "0s" (toString $change.for) (eq (toString $change.for) "0")) }}{{ end -}}
{{- with $rule.annotations }}{{ $_ := set . "runbook_url" (printf "%s#%s" $settings.runbookURL (splitList "#" .runbook | last)) }}{{ $_ = unset . "runbook" }}{{ end -}}
{{- if $change.severity }}{{ $_ := set $rule.labels "severity" $change.severity }}{{ end -}}
{{- range $key, $value := default dict $change.labels }}{{ if not (kindIs "invalid" $value) }}{{ $_ := set $rule.labels $key (include "kserve-vllm.string" $value) }}{{ end }}{{ end -}}
{{- if ne (toJson $change.enabled) "false" }}{{ $rules = append $rules $rule }}{{ end -}}
{{- end -}}
{{- if $rules }}{{ $groups = append $groups (set . "rules" $rules) }}{{ end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end }}

{{/* Names in prometheusRule.alerts that no rule has. Takes $. */}}
{{- define "kserve-vllm.check.alerts" -}}
{{- $names := list -}}
{{- range $path, $_ := .Files.Glob "files/rules/*.yaml" -}}
{{- range ($.Files.Get $path | fromYaml).groups }}{{ range .rules }}{{ if .alert }}{{ $names = append $names .alert }}{{ end }}{{ end }}{{ end -}}
{{- end -}}
{{- range $name, $_ := .Values.monitoring.prometheusRule.alerts }}
{{- if not (has $name $names) }}
{{ printf "monitoring.prometheusRule.alerts: there is no alert %s; there are %s." $name (sortAlpha $names | join ", ") }}
{{- end }}
{{- end }}
{{- end }}
