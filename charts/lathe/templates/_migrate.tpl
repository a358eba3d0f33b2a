{{/* The Job that brings every service's database to this version. (dict "root" $ "component" … "hook" bool) */}}

{{- define "lathe.migrateSettings" -}}
{{- $all := dict -}}
{{- range $service := list "accounts" "datasets" "gateway" "jobs" "models" -}}
{{- $all = mergeOverwrite $all (include "lathe.settings" (dict "root" $.root "component" $service) | fromYaml) -}}
{{- end -}}
{{- range $name, $value := $all }}
- {name: {{ $name }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- range $service := list "accounts" "datasets" "gateway" "jobs" "models" }}
- name: LATHE_{{ upper $service }}_DB__URL
  valueFrom:
    secretKeyRef:
      name: {{ include "lathe.secret" (dict "root" $.root "component" (printf "%s-db" $service) "given" (index $.root.Values.database.existingSecrets $service)) }}
      key: url
{{- end }}
{{- end -}}

{{- define "lathe.migrateJob" -}}
{{- $migrations := .root.Values.migrations -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ include "lathe.name" . }}{{ if .root.Release.IsUpgrade }}-upgrade{{ end }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "lathe.labels" . | nindent 4 }}
  {{- if .hook }}
  annotations:
    helm.sh/hook: pre-upgrade
    helm.sh/hook-weight: "1"
    helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
  {{- end }}
spec:
  backoffLimit: 3
  ttlSecondsAfterFinished: 3600
  template:
    metadata:
      labels:
        {{- include "lathe.labels" . | nindent 8 }}
    spec:
      {{- include "lathe.podBasics" . | nindent 6 }}
      # A failed try stays, so that its log can be read.
      restartPolicy: Never
      containers:
        - name: migrate
          image: {{ include "lathe.image" (dict "root" .root "image" .root.Values.images.control) }}
          imagePullPolicy: {{ .root.Values.images.pullPolicy }}
          terminationMessagePolicy: FallbackToLogsOnError
          args: [migrate, --timeout, {{ $migrations.timeoutSeconds | int64 | quote }}]
          securityContext:
            {{- include "lathe.containerSecurity" . | nindent 12 }}
          env:
            - {name: HOME, value: /tmp}
            {{- include "lathe.migrateSettings" . | nindent 12 }}
          resources:
            {{- toYaml $migrations.resources | nindent 12 }}
          volumeMounts:
            - {name: tmp, mountPath: /tmp}
      volumes:
        - name: tmp
          emptyDir: {}
{{- end -}}
