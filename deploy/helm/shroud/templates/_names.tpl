{{- define "shroud.name" -}}
{{- .Values.nameOverride | default "shroud" -}}
{{- end -}}

{{- define "shroud.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "shroud.name" .) -}}
{{- end -}}

{{- define "shroud.denied" -}}
{{- include "shroud.name" . }}-denied
{{- end -}}

{{/* The labels by which the agents' pods are found; never changed, since a DaemonSet's selector cannot be. */}}
{{- define "shroud.selector" -}}
app.kubernetes.io/name: {{ include "shroud.name" . }}
app.kubernetes.io/component: agent
{{- end -}}

{{- define "shroud.labels" -}}
app.kubernetes.io/name: {{ include "shroud.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "shroud.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* The address at which a probe on the node finds what listens at `config.http.listen`. */}}
{{- define "shroud.probe.host" -}}
{{- $host := regexReplaceAll ":[0-9]+$" .Values.config.http.listen "" -}}
{{- if has $host (list "[::1]" "[::]") }}::1{{ else }}127.0.0.1{{ end -}}
{{- end -}}

{{- define "shroud.probe.port" -}}
{{- regexFind "[0-9]+$" .Values.config.http.listen -}}
{{- end -}}
