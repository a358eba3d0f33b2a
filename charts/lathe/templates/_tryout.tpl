{{/* PostgreSQL or SeaweedFS for a try-out: one pod, one volume. (dict "root" $ "component" "postgres" "port" 5432 …) */}}

{{- define "lathe.tryout" -}}
{{- $values := index .root.Values.tryout .component -}}
{{- $tryout := .root.Values.tryout -}}
{{ include "lathe.serviceAccount" . }}
---
apiVersion: v1
kind: Service
metadata:
  {{- include "lathe.metadata" . | nindent 2 }}
spec:
  selector:
    {{- include "lathe.selector" . | nindent 4 }}
  ports:
    - {name: {{ .portName }}, port: {{ .port }}, targetPort: {{ .portName }}}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  {{- include "lathe.metadata" . | nindent 2 }}
spec:
  replicas: 1
  serviceName: {{ include "lathe.name" . }}
  selector:
    matchLabels:
      {{- include "lathe.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "lathe.selector" . | nindent 8 }}
    spec:
      {{- include "lathe.podBasics" (merge (dict "nodeSelector" $tryout.nodeSelector "tolerations" $tryout.tolerations) .) | nindent 6 }}
      terminationGracePeriodSeconds: 30
      containers:
        - name: {{ .component }}
          image: {{ include "lathe.image" (dict "root" .root "image" .root.Values.images.tryout) }}
          imagePullPolicy: {{ .root.Values.images.pullPolicy }}
          terminationMessagePolicy: FallbackToLogsOnError
          command: [tryout-{{ .component }}]
          securityContext:
            {{- include "lathe.containerSecurity" . | nindent 12 }}
          env:
            - {name: HOME, value: /tmp}
            {{- include (printf "lathe.tryoutEnv.%s" .component) . | nindent 12 }}
          ports:
            - {name: {{ .portName }}, containerPort: {{ .port }}}
          startupProbe:
            {{- if eq .component "seaweedfs" }}
            # The port opens a little before the bucket is there.
            exec: {command: [tryout-seaweedfs, --ready]}
            {{- else }}
            tcpSocket: {port: {{ .port }}}
            {{- end }}
            periodSeconds: 1
            timeoutSeconds: 5
            failureThreshold: 120
          readinessProbe:
            tcpSocket: {port: {{ .port }}}
            periodSeconds: 5
          livenessProbe:
            tcpSocket: {port: {{ .port }}}
            periodSeconds: 10
            timeoutSeconds: 10
            failureThreshold: 6
          resources:
            {{- toYaml $values.resources | nindent 12 }}
          volumeMounts:
            - {name: data, mountPath: /var/lib/lathe}
            - {name: tmp, mountPath: /tmp}
      volumes:
        - name: tmp
          emptyDir: {}
  # Kubernetes leaves the volume of a StatefulSet where it is, also after an uninstall.
  volumeClaimTemplates:
    - metadata:
        name: data
        labels:
          {{- include "lathe.selector" . | nindent 10 }}
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $tryout.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests: {storage: {{ $values.storage }}}
{{- end -}}

{{- define "lathe.tryoutEnv.postgres" -}}
- name: POSTGRES_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "lathe.name" . }}, key: password}}
{{- range $service := list "accounts" "datasets" "gateway" "jobs" "models" }}
- name: POSTGRES_PASSWORD_{{ upper $service }}
  valueFrom: {secretKeyRef: {name: {{ include "lathe.name" (dict "root" $.root "component" (printf "%s-db" $service)) }}, key: password}}
{{- end }}
{{- end -}}

{{- define "lathe.tryoutEnv.seaweedfs" -}}
{{- $store := include "lathe.secret" (dict "root" .root "component" "store" "given" .root.Values.store.existingSecret) -}}
- name: S3_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ $store }}, key: access-key}}
- name: S3_SECRET_KEY
  valueFrom: {secretKeyRef: {name: {{ $store }}, key: secret-key}}
- name: S3_BUCKET
  value: {{ default "lathe" .root.Values.store.bucket }}
{{- end -}}
