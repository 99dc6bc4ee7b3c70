{{/* Secrets in plain text, wherever values take them to. Everybody who may read the objects sees them. */}}

{{/* Not empty for text that is a secret by its looks: a password or a token in an address, a token's known beginning, a header
with credentials, a private key, a signed token, an address that is a secret as a whole. */}}
{{- define "kserve-vllm.secretText" -}}
{{- $looks := list
  "://[^/@ ]*:[^/@ ]+@"
  "://(hf_|sk-|ghp_|github_pat_|glpat-)[^/@ ]+@"
  "(?i)[?&](token|key|sig|signature|secret|password|(api|access)[-_]?(key|token)|x-(amz|goog)-signature)=[^&]"
  "(?i)(^|[=:,;] *)(bearer|basic)( +|%20)[^ ]"
  "(^|[=, ])(hf_|sk-|gsk_|nvapi-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA|ASIA|AIza)[A-Za-z0-9_-]{12,}"
  "(?i)(^|[;, ])(accountkey|sharedaccess(key|signature)|password|pwd)=[^;, ]"
  "-----BEGIN [A-Z ]*PRIVATE KEY"
  "(^|[=, ])eyJ[A-Za-z0-9_-]+[.][A-Za-z0-9_-]+[.][A-Za-z0-9_-]+"
  "https://(hooks[.]slack[.]com/(services|workflows)|discord(app)?[.]com/api/webhooks|[a-z0-9.-]*webhook[.]office[.]com)/."
-}}
{{- range $looks }}{{ if regexMatch . $ }}yes{{ end }}{{ end -}}
{{- end }}

{{/* Not empty for a word of the command line that holds a secret. */}}
{{- define "kserve-vllm.secretWord" -}}
{{- if or (regexMatch "^--?([a-z0-9]+[-_])*(api[-_]keys?|(hf|auth|access|bearer)[-_]token|password|secret)(=|$)" .) (include "kserve-vllm.secretText" .) }}yes{{ end -}}
{{- end }}

{{/* Not empty for a variable with a secret in plain text. Names of files, addresses and ids are none. */}}
{{- define "kserve-vllm.secretVariable" -}}
{{- if hasKey . "value" -}}
{{- $value := include "kserve-vllm.string" .value -}}
{{- $named := regexMatch "(?i)(token|secret|passw(or)?d|passphrase|credentials?|(^|_)(pass|pwd|pat|auth|sas|jwt)|connection_?string|(api|access|private|account|signing|encryption|storage|shared|master|secret|license)_?key|secret_key_base)$" .name -}}
{{/* Where credentials lie is no secret, and PWD is where a shell is. */}}
{{- if or (and (regexMatch "(?i)(credentials?|^pwd)$" .name) (hasPrefix "/" $value)) (regexMatch "(?i)^oldpwd$" .name) }}{{ $named = false }}{{ end -}}
{{/* OpenTelemetry's headers, NAME=VALUE,...: by them a collector knows who sends. */}}
{{- if and (hasSuffix "_HEADERS" (upper .name)) (regexMatch "(?i)(auth|cookie|key|token|secret|passw|team|tenant)[^=,]*=" $value) }}{{ $named = true }}{{ end -}}
{{- if and $value (or $named (include "kserve-vllm.secretText" $value)) }}yes{{ end -}}
{{- end -}}
{{- end }}

{{/* Of environment that is no service's own: of Jobs, of init containers. Takes (list at env). */}}
{{- define "kserve-vllm.check.plainEnvironment" -}}
{{- range index . 1 }}
{{- if include "kserve-vllm.secretVariable" . }}
{{ printf "%s: %s looks like a secret and is given as plain text; use valueFrom.secretKeyRef." (index $ 0) .name }}
{{- end }}
{{- end }}
{{- end }}

{{/* Of a Job. Takes (list $ at job volumes): the names of the chart's own volumes beside tmp and ca. */}}
{{- define "kserve-vllm.check.job" -}}
{{- $at := printf "%s.job" (index . 1) -}}
{{- $job := index . 2 -}}
{{ include "kserve-vllm.check.plainEnvironment" (list (index . 1) $job.env) }}
{{ include "kserve-vllm.check.quantities" (list (printf "%s.resources" $at) $job.resources) }}
{{ include "kserve-vllm.check.kubernetes" (list (index . 0) $at $job) }}
{{- $own := append (index . 3) "tmp" }}
{{- if include "kserve-vllm.caFile" (index . 0) | fromJson }}{{ $own = append $own "ca" }}{{ end }}
{{ include "kserve-vllm.check.mounts" (dict "at" $at "volumes" $own "entry" $job) }}
{{- end }}

{{/* Of text anywhere in values, which objects then show. Takes (list at values). Environment and arguments of services and
runtimes have sentences of their own. */}}
{{- define "kserve-vllm.check.addresses" -}}
{{- $at := index . 0 -}}
{{- $value := index . 1 -}}
{{- if kindIs "map" $value }}
{{- range $key, $child := $value }}
{{- if and (has $key (list "memory" "ephemeral-storage" "size" "modelSize" "sizeLimit" "tmpSizeLimit" "sharedMemory")) (regexMatch "^[0-9.]+([KMGTPE]i|[numkMGTPE]|[eE][-+]?[0-9]+)?$" (include "kserve-vllm.string" $child)) (not (regexMatch "(?i)(labels|annotations|selector|parameters|speculative)$" $at)) }}
{{- $bytes := include "kserve-vllm.amount" $child | float64 }}
{{- if and (gt $bytes 0.0) (lt $bytes 1048576.0) }}
{{ printf "%s.%s: %s is less than a mebibyte; write a unit of bytes, such as 512Mi or 8Gi (m is a thousandth of one)." $at $key (include "kserve-vllm.string" $child) }}
{{- end }}
{{- end }}
{{- if eq $key "initContainers" }}
{{- range $child }}
{{- $container := printf "%s.initContainers.%s" $at .name }}
{{ include "kserve-vllm.check.plainEnvironment" (list $container .env) }}
{{- range concat (default list .command) (default list .args) }}
{{- if include "kserve-vllm.secretWord" (include "kserve-vllm.string" .) }}
{{ printf "%s: its command has a secret in plain text; give it as environment with valueFrom.secretKeyRef." $container }}
{{- end }}
{{- end }}
{{- end }}
{{- else if eq $key "parameters" }}
{{- range $name, $text := default dict $child }}
{{- if include "kserve-vllm.secretVariable" (dict "name" $name "value" (default "" $text)) }}
{{ printf "%s.parameters.%s: it looks like a secret and is given as plain text; put it into KServe's Secret storage-config." $at $name }}
{{- end }}
{{- end }}
{{- else if not (has $key (list "env" "extraArgs" "serverArgs" "args")) }}
{{ include "kserve-vllm.check.addresses" (list (printf "%s.%s" $at $key) $child) }}
{{- end }}
{{- end }}
{{- else if kindIs "slice" $value }}
{{- range $index, $child := $value }}
{{ include "kserve-vllm.check.addresses" (list (printf "%s[%d]" $at $index) $child) }}
{{- end }}
{{- else if kindIs "string" $value }}
{{- if regexMatch "://[^/@ ]*:[^/@ ]+@" $value }}
{{ printf "%s: the address has a password in plain text; give it without, and the password by a Secret (env with valueFrom.secretKeyRef, serviceAccounts)." $at }}
{{- else if include "kserve-vllm.secretText" $value }}
{{ printf "%s: it has a secret in plain text, which all see who may read the objects; give it by a Secret (env with valueFrom.secretKeyRef, serviceAccounts)." $at }}
{{- end }}
{{- end }}
{{- end }}

{{/* Of what belongs to the release as a whole. Takes $. */}}
{{- define "kserve-vllm.check.plainText" -}}
{{- range $top := list "cluster" "commonLabels" "commonAnnotations" "runtimes" "serviceAccounts" "routes" "monitoring" "image" "tests" }}
{{ include "kserve-vllm.check.addresses" (list $top (index $.Values $top)) }}
{{- end }}
{{ include "kserve-vllm.check.addresses" (list "proxy.noProxy" .Values.proxy.noProxy) }}
{{- end }}
