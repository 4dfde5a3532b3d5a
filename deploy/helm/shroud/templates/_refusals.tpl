{{/* What cannot be right, found before anything reaches the cluster. Each message says what to do. */}}
{{- define "shroud.refusals" -}}
{{- $config := .Values.config -}}
{{- if not .Values.image.repository -}}
  {{- fail "image.repository is empty: build deploy/image, push it, and name the place here, as in --set image.repository=registry.example.com/shroud" -}}
{{- end -}}
{{- if not $config.protected -}}
  {{- fail "config.protected is empty, so nothing would be encrypted: name all pod ranges of the cluster, as in --set 'config.protected={10.244.0.0/16,fd00:10:244::/48}'" -}}
{{- end -}}
{{- range $config.protected -}}
  {{- if regexMatch "/0$" . -}}
    {{- fail (printf "config.protected has %s, which is every address there is, the nodes' too: name the pod ranges of the cluster" .) -}}
  {{- end -}}
{{- end -}}
{{- $ports := dict -}}
{{- range $key, $port := dict "config.encryption.listenPort" $config.encryption.listenPort "config.routing.vxlanPort" $config.routing.vxlanPort "config.routing.genevePort" $config.routing.genevePort -}}
  {{- $port = int $port | toString -}}
  {{- if hasKey $ports $port -}}
    {{- fail (printf "%s is %s, and so is %s: give each a UDP port of its own" $key $port (get $ports $port)) -}}
  {{- end -}}
  {{- $_ := set $ports $port $key -}}
{{- end -}}
{{- if and .Values.podMonitor.enabled (not (regexMatch "^(0\\.0\\.0\\.0|\\[::\\]):" $config.http.listen)) -}}
  {{- fail (printf "podMonitor.enabled is true, and config.http.listen is %s, where nobody outside the node can ask: set it to 0.0.0.0:21320 (or [::]:21320), or podMonitor.enabled to false" $config.http.listen) -}}
{{- end -}}
{{- if and .Values.image.digest .Values.image.tag -}}
  {{- fail "image.digest and image.tag are both set, and only the digest would count: leave one of them empty" -}}
{{- end -}}
{{- end -}}
