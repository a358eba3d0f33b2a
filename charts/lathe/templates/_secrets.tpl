{{/* Secrets that are made once: what the cluster holds already is always taken over. */}}

{{/* The data of a Secret of this release, an empty dict if there is none (helm template never sees any). */}}
{{- define "lathe.existing" -}}
{{- $secret := lookup "v1" "Secret" .root.Release.Namespace (include "lathe.name" .) -}}
{{- default (dict) (default (dict) $secret).data | toYaml -}}
{{- end -}}

{{/* (dict "root" $ "component" "store" "data" (dict "key" "value") "keep" true) -> a Secret; what exists wins. */}}
{{- define "lathe.generated" -}}
{{- $existing := include "lathe.existing" . | fromYaml -}}
apiVersion: v1
kind: Secret
metadata:
  {{- include "lathe.metadata" . | nindent 2 }}
  {{- if .keep }}
  annotations:
    # What is in the volumes is of no use without it.
    helm.sh/resource-policy: keep
  {{- end }}
type: Opaque
data:
  {{- range $key, $value := .data }}
  {{ $key }}: {{ default ($value | b64enc) (get $existing $key) }}
  {{- end }}
{{- end -}}
