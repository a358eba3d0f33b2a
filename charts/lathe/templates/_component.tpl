{{/* A control service: (dict "root" $ "component" "jobs") -> account, settings, Deployment, Service, budget. */}}

{{- define "lathe.service" -}}
{{ include "lathe.serviceAccount" . }}
---
apiVersion: v1
kind: ConfigMap
metadata:
  {{- include "lathe.metadata" . | nindent 2 }}
data:
  {{- include "lathe.settings" . | nindent 2 }}
---
{{ include "lathe.deployment" . }}
---
apiVersion: v1
kind: Service
metadata:
  {{- include "lathe.metadata" . | nindent 2 }}
  {{- if eq .component "gateway" }}
  {{- with .root.Values.gateway.service.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
spec:
  type: {{ eq .component "gateway" | ternary .root.Values.gateway.service.type "ClusterIP" }}
  selector:
    {{- include "lathe.selector" . | nindent 4 }}
  ports:
    - {name: grpc, port: 7460, targetPort: grpc, appProtocol: {{ include "lathe.grpcProtocol" . }}}
    {{- if eq .component "gateway" }}
    - {name: http, port: 8080, targetPort: http, appProtocol: {{ not .root.Values.gateway.tls.existingSecret | ternary "http" "https" }}}
    {{- end }}
{{- if include "lathe.hasBudget" . }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "lathe.metadata" . | nindent 2 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "lathe.selector" . | nindent 6 }}
{{- end }}
{{- end -}}

{{/* What a load balancer is told about the port; between services it is TLS always. */}}
{{- define "lathe.grpcProtocol" -}}
{{- $plain := and (eq .component "gateway") (not .root.Values.gateway.tls.existingSecret) -}}
{{- $plain | ternary "kubernetes.io/h2c" "https" -}}
{{- end -}}

{{/* One replica with a budget would keep its node from ever being drained. */}}
{{- define "lathe.hasBudget" -}}
{{- $values := index .root.Values .component -}}
{{- $fewest := int $values.replicas -}}
{{- if and (eq .component "gateway") $values.autoscaling.enabled }}{{ $fewest = int $values.autoscaling.minReplicas }}{{ end -}}
{{- if gt $fewest 1 }}yes{{ end -}}
{{- end -}}

{{- define "lathe.deployment" -}}
{{- $values := index .root.Values .component -}}
{{- $scaled := and (eq .component "gateway") $values.autoscaling.enabled -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "lathe.metadata" . | nindent 2 }}
spec:
  {{- if not $scaled }}
  replicas: {{ $values.replicas }}
  {{- else }}
  {{- /*
  The autoscaler's. Left out, an upgrade that turns it on would first make one of however many there are; and of none,
  which a restore of a backup leaves, the autoscaler makes none.
  */}}
  {{- with lookup "apps/v1" "Deployment" .root.Release.Namespace (include "lathe.name" .) }}
  replicas: {{ max .spec.replicas $values.autoscaling.minReplicas }}
  {{- end }}
  {{- end }}
  revisionHistoryLimit: 3
  strategy:
    type: RollingUpdate
    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
  selector:
    matchLabels:
      {{- include "lathe.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "lathe.labels" . | nindent 8 }}
      annotations:
        {{- include "lathe.podAnnotations" . | nindent 8 }}
    spec:
      {{- include "lathe.servicePod" . | nindent 6 }}
{{- end -}}

{{/* A service reads its settings once, so a change of them must replace its pods. */}}
{{- define "lathe.podAnnotations" -}}
{{- $own := dict "checksum/config" (include "lathe.settings" . | sha256sum) -}}
{{- if eq .component "jobs" }}
{{- $_ := set $own "checksum/engines" (include "lathe.engineTemplates" .root | sha256sum) -}}
{{- end -}}
{{- mergeOverwrite (include "lathe.scraped" . | fromYaml) (index .root.Values .component).podAnnotations $own | toYaml -}}
{{- end -}}

{{- define "lathe.servicePod" -}}
{{- $values := index .root.Values .component -}}
{{ include "lathe.podBasics" (merge (dict "nodeSelector" $values.nodeSelector "tolerations" $values.tolerations) .) }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "lathe.selector" . | nindent 8 }}
# No preStop: told to end, a service says so to the probes and goes on answering for the delay, then lets calls and
# streams finish for the grace; a little more for what comes after them.
terminationGracePeriodSeconds: {{ add .root.Values.drain.delaySeconds (include "lathe.grace" . | int64) 15 }}
initContainers:
  - name: schema
    {{- include "lathe.serviceContainer" . | nindent 4 }}
    args: [migrate, {{ .component }}, --wait, --timeout, {{ .root.Values.migrations.timeoutSeconds | int64 | quote }}]
    resources:
      {{- toYaml $values.resources | nindent 6 }}
containers:
  - name: {{ .component }}
    {{- include "lathe.serviceContainer" . | nindent 4 }}
    args: [serve, {{ .component }}]
    ports:
      - {name: grpc, containerPort: 7460}
      - {name: health, containerPort: 7461}
      - {name: metrics, containerPort: 9090}
      {{- if eq .component "gateway" }}
      - {name: http, containerPort: 8080}
      {{- end }}
    {{- include "lathe.probes" (dict "startupSeconds" 120) | nindent 4 }}
    resources:
      {{- toYaml $values.resources | nindent 6 }}
volumes:
  {{- include "lathe.serviceVolumes" . | nindent 2 }}
{{- end -}}

{{/* What the waiting init container and the service itself have in common. */}}
{{- define "lathe.serviceContainer" -}}
image: {{ include "lathe.image" (dict "root" .root "image" .root.Values.images.control) }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  {{- include "lathe.containerSecurity" . | nindent 2 }}
envFrom:
  - configMapRef: {name: {{ include "lathe.name" . }}}
env:
  - {name: HOME, value: /tmp}
  {{- include "lathe.secretSettings" . | nindent 2 }}
volumeMounts:
  - {name: tls, mountPath: /etc/lathe/tls, readOnly: true}
  - {name: service-token, mountPath: /etc/lathe/service-token, readOnly: true}
  {{- if eq .component "jobs" }}
  - {name: engine-token, mountPath: /etc/lathe/engine-token, readOnly: true}
  - {name: engines, mountPath: /etc/lathe/engines, readOnly: true}
  {{- end }}
  {{- if and (eq .component "gateway") .root.Values.gateway.tls.existingSecret }}
  - {name: public-tls, mountPath: /etc/lathe/public-tls, readOnly: true}
  {{- end }}
  - {name: tmp, mountPath: /tmp}
  - {name: cache, mountPath: /var/cache/lathe}
{{- end -}}

{{- define "lathe.serviceVolumes" -}}
{{ include "lathe.credentialVolumes" . }}
{{- if eq .component "jobs" }}
- name: engines
  configMap: {name: {{ include "lathe.fullname" .root }}-engines}
{{- end }}
{{- if and (eq .component "gateway") .root.Values.gateway.tls.existingSecret }}
- name: public-tls
  secret: {secretName: {{ .root.Values.gateway.tls.existingSecret }}}
{{- end }}
- name: tmp
  emptyDir: {}
- name: cache
  {{- if eq .component "datasets" }}
  emptyDir: {sizeLimit: {{ .root.Values.datasets.cache.sizeLimit }}}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end -}}

{{/* Certificates and tokens: mounted as folders, so that a change arrives without a restart. */}}
{{- define "lathe.credentialVolumes" -}}
{{- $tls := index .root.Values.tls.existingSecrets .component -}}
- name: tls
  secret: {secretName: {{ include "lathe.secret" (dict "root" .root "component" (printf "%s-tls" .component) "given" $tls) }}}
- name: service-token
  secret: {secretName: {{ include "lathe.secret" (dict "root" .root "component" "service-token" "given" .root.Values.serviceToken.existingSecret) }}}
{{- if has .component (list "jobs" "engine") }}
- name: engine-token
  secret: {secretName: {{ include "lathe.secret" (dict "root" .root "component" "engine-token" "given" .root.Values.engineToken.existingSecret) }}}
{{- end }}
{{- end -}}
