{{/* The LATHE_ variables. Those of a service stand in its ConfigMap; an engine's in its pod template. */}}

{{- define "lathe.settings.shared" -}}
LATHE_LOG__LEVEL: {{ .root.Values.log.level | quote }}
LATHE_LOG__FORMAT: {{ .root.Values.log.format | quote }}
LATHE_METRICS__HOST: "0.0.0.0"
LATHE_RPC__HOST: "0.0.0.0"
LATHE_RPC__SERVICE_TOKEN_FILE: /etc/lathe/service-token/token
LATHE_RPC__PEERS__CA_FILE: /etc/lathe/tls/ca.crt
LATHE_RPC__PEERS__CERT_FILE: /etc/lathe/tls/tls.crt
LATHE_RPC__PEERS__KEY_FILE: /etc/lathe/tls/tls.key
{{- if has .component (list "jobs" "engine") }}
LATHE_RPC__ENGINE_TOKEN_FILE: /etc/lathe/engine-token/token
{{- end }}
{{- if ne .component "gateway" }}
LATHE_RPC__TLS_CERT_FILE: /etc/lathe/tls/tls.crt
LATHE_RPC__TLS_KEY_FILE: /etc/lathe/tls/tls.key
LATHE_RPC__TLS_CLIENT_CA_FILE: /etc/lathe/tls/ca.crt
{{- end }}
{{- end -}}

{{- define "lathe.settings.drain" -}}
LATHE_RPC__DRAIN_DELAY_S: {{ .root.Values.drain.delaySeconds | int64 | quote }}
LATHE_RPC__GRACE_S: {{ include "lathe.grace" . | quote }}
{{- end -}}

{{/* Seconds that running calls have: the gateway's are the streams of users. */}}
{{- define "lathe.grace" -}}
{{- eq .component "gateway" | ternary .root.Values.drain.streamGraceSeconds .root.Values.drain.graceSeconds | int64 -}}
{{- end -}}

{{- define "lathe.settings.store" -}}
LATHE_STORE__KIND: s3
{{- if include "lathe.tryoutStore" .root }}
LATHE_STORE__ENDPOINT: {{ printf "%s:8333" (include "lathe.name" (dict "root" .root "component" "seaweedfs")) }}
LATHE_STORE__BUCKET: {{ default "lathe" .root.Values.store.bucket }}
LATHE_STORE__SECURE: "false"
{{- else }}
LATHE_STORE__ENDPOINT: {{ .root.Values.store.endpoint | quote }}
LATHE_STORE__BUCKET: {{ .root.Values.store.bucket | quote }}
LATHE_STORE__SECURE: {{ .root.Values.store.secure | quote }}
{{- end }}
LATHE_STORE__REGION: {{ .root.Values.store.region | quote }}
{{- end -}}

{{- define "lathe.settings.accounts" -}}
LATHE_ACCOUNTS_DB__POOL_SIZE: {{ .root.Values.database.poolSize | int64 | quote }}
{{- end -}}

{{- define "lathe.settings.datasets" -}}
LATHE_DATASETS_DB__POOL_SIZE: {{ .root.Values.database.poolSize | int64 | quote }}
LATHE_DATASETS_CACHE_FOLDER: /var/cache/lathe
LATHE_DATASETS_MODELS_ADDRESS: {{ include "lathe.address" (list .root "models") }}
{{ include "lathe.settings.store" . }}
{{- if .root.Values.imports.enabled }}
LATHE_DATASETS_IMPORTS__ENABLED: "true"
{{- end }}
{{- with .root.Values.store.publicEndpoint }}
LATHE_DATASETS_STORE__PUBLIC_ENDPOINT: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "lathe.settings.models" -}}
LATHE_MODELS_DB__POOL_SIZE: {{ .root.Values.database.poolSize | int64 | quote }}
{{ include "lathe.settings.store" . }}
{{- end -}}

{{- define "lathe.settings.jobs" -}}
{{- $engines := .root.Values.engines -}}
LATHE_JOBS_DB__POOL_SIZE: {{ .root.Values.database.poolSize | int64 | quote }}
LATHE_JOBS_ACCOUNTS_ADDRESS: {{ include "lathe.address" (list .root "accounts") }}
LATHE_JOBS_DATASETS_ADDRESS: {{ include "lathe.address" (list .root "datasets") }}
LATHE_JOBS_MODELS_ADDRESS: {{ include "lathe.address" (list .root "models") }}
LATHE_JOBS_JOBS_ADDRESS: {{ include "lathe.address" (list .root "jobs") }}
LATHE_JOBS_MIN_ENGINES: {{ $engines.min | int64 | quote }}
LATHE_JOBS_MAX_ENGINES_PER_BASE: {{ $engines.maxPerBase | int64 | quote }}
LATHE_JOBS_MAX_ENGINES: {{ $engines.max | int64 | quote }}
LATHE_JOBS_MAX_WORKERS: {{ $engines.maxWorkers | int64 | quote }}
LATHE_JOBS_ENGINE_IDLE_TIMEOUT_S: {{ $engines.idleTimeoutSeconds | int64 | quote }}
LATHE_JOBS_ENGINE_CLASSES: {{ keys $engines.classes | sortAlpha | toJson | quote }}
LATHE_JOBS_DEFAULT_ENGINE_CLASS: {{ $engines.defaultClass | quote }}
LATHE_JOBS_LAUNCHER__KIND: kubernetes
LATHE_JOBS_LAUNCHER__KUBERNETES__NAMESPACE: {{ .root.Release.Namespace | quote }}
LATHE_JOBS_LAUNCHER__KUBERNETES__RELEASE: {{ .root.Release.Name | quote }}
LATHE_JOBS_LAUNCHER__KUBERNETES__NAME_PREFIX: {{ include "lathe.fullname" .root | quote }}
LATHE_JOBS_LAUNCHER__KUBERNETES__TEMPLATES_FOLDER: /etc/lathe/engines
LATHE_JOBS_LAUNCHER__KUBERNETES__OWNER_DEPLOYMENT: {{ include "lathe.name" . }}
LATHE_JOBS_LAUNCHER__KUBERNETES__ENGINES: {{ $engines.kind }}
{{- end -}}

{{- define "lathe.settings.gateway" -}}
LATHE_GATEWAY_DB__POOL_SIZE: {{ .root.Values.database.poolSize | int64 | quote }}
LATHE_GATEWAY_HTTP_HOST: "0.0.0.0"
LATHE_GATEWAY_CACHE_FOLDER: /var/cache/lathe
LATHE_GATEWAY_ACCOUNTS_ADDRESS: {{ include "lathe.address" (list .root "accounts") }}
LATHE_GATEWAY_DATASETS_ADDRESS: {{ include "lathe.address" (list .root "datasets") }}
LATHE_GATEWAY_MODELS_ADDRESS: {{ include "lathe.address" (list .root "models") }}
LATHE_GATEWAY_JOBS_ADDRESS: {{ include "lathe.address" (list .root "jobs") }}
{{- if .root.Values.gateway.tls.existingSecret }}
LATHE_GATEWAY_RPC__TLS_CERT_FILE: /etc/lathe/public-tls/tls.crt
LATHE_GATEWAY_RPC__TLS_KEY_FILE: /etc/lathe/public-tls/tls.key
LATHE_GATEWAY_HTTP_TLS_CERT_FILE: /etc/lathe/public-tls/tls.crt
LATHE_GATEWAY_HTTP_TLS_KEY_FILE: /etc/lathe/public-tls/tls.key
{{- end }}
{{ include "lathe.settings.store" . }}
{{- end -}}

{{- define "lathe.address" -}}
{{- printf "%s-%s:7460" (include "lathe.fullname" (index . 0)) (index . 1) -}}
{{- end -}}

{{/* All variables of a service that are no secret, the operator's own last. */}}
{{- define "lathe.settings" -}}
{{- $shared := include "lathe.settings.shared" . | fromYaml -}}
{{- $drain := include "lathe.settings.drain" . | fromYaml -}}
{{- $own := include (printf "lathe.settings.%s" .component) . | fromYaml -}}
{{- $given := (index .root.Values .component).settings -}}
{{- mergeOverwrite (dict) $shared $drain $own $given | toYaml -}}
{{- end -}}

{{/* The variables that come from Secrets. */}}
{{- define "lathe.secretSettings" -}}
{{- $given := index .root.Values.database.existingSecrets .component -}}
- name: LATHE_{{ upper .component }}_DB__URL
  valueFrom:
    secretKeyRef:
      name: {{ include "lathe.secret" (dict "root" .root "component" (printf "%s-db" .component) "given" $given) }}
      key: url
{{- if has .component (list "gateway" "datasets" "models") }}
{{ include "lathe.storeKeys" . }}
{{- end }}
{{- with .root.Values.imports }}
{{- if and .enabled .existingSecret (eq $.component "datasets") }}
- name: LATHE_DATASETS_IMPORTS__HUB_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: hub-token, optional: true}}
- name: LATHE_DATASETS_IMPORTS__S3__ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: s3-access-key, optional: true}}
- name: LATHE_DATASETS_IMPORTS__S3__SECRET_KEY
  valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: s3-secret-key, optional: true}}
{{- end }}
{{- end }}
{{- if eq .component "accounts" }}
- name: LATHE_ACCOUNTS_BOOTSTRAP_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "lathe.secret" (dict "root" .root "component" "bootstrap" "given" .root.Values.bootstrapKey.existingSecret) }}
      key: api-key
{{- end }}
{{- end -}}

{{- define "lathe.storeKeys" -}}
{{- $store := include "lathe.secret" (dict "root" .root "component" "store" "given" .root.Values.store.existingSecret) -}}
- name: LATHE_STORE__ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ $store }}, key: access-key}}
- name: LATHE_STORE__SECRET_KEY
  valueFrom: {secretKeyRef: {name: {{ $store }}, key: secret-key}}
{{- end -}}
