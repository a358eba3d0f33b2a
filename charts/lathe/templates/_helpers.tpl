{{/* Names, labels and what every pod has. A component is asked for as (dict "root" $ "component" "jobs"). */}}

{{- define "lathe.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lathe.name" -}}
{{- printf "%s-%s" (include "lathe.fullname" .root) .component -}}
{{- end -}}

{{- define "lathe.selector" -}}
app.kubernetes.io/name: lathe
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "lathe.labels" -}}
{{ include "lathe.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "lathe.metadata" -}}
name: {{ include "lathe.name" . }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "lathe.labels" . | nindent 2 }}
{{- end -}}

{{/* (dict "root" $ "image" <repository, tag, digest>) -> a reference; the tag is the chart's version unless given. */}}
{{- define "lathe.image" -}}
{{- $name := .image.repository -}}
{{- with .root.Values.global.imageRegistry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The Secret of a kind: the operator's own, or the generated one. (dict "root" $ "component" "store" "given" "") */}}
{{- define "lathe.secret" -}}
{{- default (include "lathe.name" (dict "root" .root "component" .component)) .given -}}
{{- end -}}

{{- define "lathe.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "lathe.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* A lost node's pods go at once instead of after Kubernetes' five minutes. Takes the operator's own tolerations. */}}
{{- define "lathe.tolerations" -}}
- {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 10}
- {key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 10}
{{- with . }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* How Prometheus finds a pod of ours, unless the operator's own annotations say otherwise. */}}
{{- define "lathe.scraped" -}}
prometheus.io/scrape: "true"
prometheus.io/port: "9090"
{{- end -}}

{{/* What every pod's spec begins with. (dict "root" $ "component" … "nodeSelector" … "tolerations" …) */}}
{{- define "lathe.podBasics" -}}
serviceAccountName: {{ include "lathe.name" . }}
automountServiceAccountToken: {{ eq .component "jobs" }}
enableServiceLinks: false
{{- with .root.Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- include "lathe.podSecurity" . | nindent 2 }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
tolerations:
  {{- include "lathe.tolerations" .tolerations | nindent 2 }}
{{- end -}}

{{- define "lathe.serviceAccount" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "lathe.metadata" . | nindent 2 }}
automountServiceAccountToken: false
{{- end -}}

{{/* The gRPC health port is never TLS, so that the kubelet can ask it. */}}
{{- define "lathe.probes" -}}
startupProbe:
  grpc: {port: 7461}
  periodSeconds: 1
  # A probe of a port that is not open yet uses up its time.
  timeoutSeconds: 2
  failureThreshold: {{ .startupSeconds }}
readinessProbe:
  grpc: {port: 7461}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:
  grpc: {port: 7461}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end -}}

{{/* Whether the chart brings the database or the store; an empty string means no. */}}
{{- define "lathe.tryoutPostgres" -}}
{{- if and .Values.tryout.enabled (not (compact (values .Values.database.existingSecrets))) }}yes{{ end -}}
{{- end -}}

{{- define "lathe.tryoutStore" -}}
{{- if and .Values.tryout.enabled (not .Values.store.endpoint) }}yes{{ end -}}
{{- end -}}
