{{/* Engines are made by jobs from these pod templates, one file for each class. */}}

{{- define "lathe.engineTemplates" -}}
{{- $root := . -}}
{{- range $name, $class := .Values.engines.classes }}
{{ $name }}.yaml: |
  {{- include "lathe.engineTemplate" (dict "root" $root "component" "engine" "class" $class) | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A PodTemplateSpec. jobs adds the name, the owner, which engine it is, and what Ray needs. */}}
{{- define "lathe.engineTemplate" -}}
{{- $engines := .root.Values.engines -}}
metadata:
  labels:
    {{- include "lathe.labels" . | nindent 4 }}
  annotations:
    {{- mergeOverwrite (include "lathe.scraped" . | fromYaml) $engines.podAnnotations | toYaml | nindent 4 }}
spec:
  {{- include "lathe.podBasics" (merge (dict "nodeSelector" .class.nodeSelector "tolerations" .class.tolerations) .) | nindent 2 }}
  # Open streams and checkpoints take the grace; the rest is for the end itself.
  terminationGracePeriodSeconds: {{ add $engines.drainGraceSeconds 30 }}
  containers:
    - name: engine
      {{- include "lathe.engineContainer" . | nindent 6 }}
  volumes:
    {{- include "lathe.credentialVolumes" . | nindent 4 }}
    - name: tmp
      emptyDir: {}
    - name: cache
      {{- if $engines.cache.existingClaim }}
      persistentVolumeClaim: {claimName: {{ $engines.cache.existingClaim }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $engines.cache.sizeLimit }}}
      {{- end }}
{{- end -}}

{{- define "lathe.engineContainer" -}}
{{- $own := default (dict) .class.image -}}
{{- $image := mergeOverwrite (dict) .root.Values.images.engine $own -}}
{{- /* A digest that all engines are pinned to is of another image than the one that the class names. */ -}}
{{- if and (or $own.repository $own.tag) (not $own.digest) }}{{ $image = omit $image "digest" }}{{ end -}}
image: {{ include "lathe.image" (dict "root" .root "image" $image) }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  {{- include "lathe.containerSecurity" . | nindent 2 }}
env:
  {{- include "lathe.engineEnv" . | nindent 2 }}
ports:
  - {name: grpc, containerPort: 7460}
  - {name: health, containerPort: 7461}
  - {name: metrics, containerPort: 9090}
{{ include "lathe.probes" (dict "startupSeconds" 900) }}
lifecycle:
  preStop:
    exec: {command: [lathe, engine, drain, --grace, {{ .root.Values.engines.drainGraceSeconds | int64 | quote }}]}
resources:
  {{- include "lathe.engineResources" . | nindent 2 }}
volumeMounts:
  - {name: tls, mountPath: /etc/lathe/tls, readOnly: true}
  - {name: service-token, mountPath: /etc/lathe/service-token, readOnly: true}
  - {name: engine-token, mountPath: /etc/lathe/engine-token, readOnly: true}
  - {name: tmp, mountPath: /tmp}
  - {name: cache, mountPath: /var/cache/lathe}
{{- end -}}

{{/* POD_IP comes first: a variable may name only those before it. */}}
{{- define "lathe.engineEnv" -}}
{{- $shared := include "lathe.settings.shared" . | fromYaml -}}
{{- $store := include "lathe.settings.store" . | fromYaml -}}
{{- $own := dict
  "HOME" "/tmp"
  "LATHE_ENGINE_ADVERTISE_ADDRESS" "$(POD_IP):7460"
  "LATHE_ENGINE_CACHE_FOLDER" "/var/cache/lathe"
  "LATHE_ENGINE_DEVICE" (default "cpu" .class.device)
  "LATHE_ENGINE_RPC__PORT" "7460"
  "LATHE_ENGINE_DRAIN_GRACE_S" (.root.Values.engines.drainGraceSeconds | int64 | toString) -}}
{{- $given := mergeOverwrite (dict) .root.Values.engines.settings (default (dict) .class.settings) -}}
{{- $settings := mergeOverwrite (dict) $shared $store $own $given -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- if not (hasKey $settings "LATHE_ENGINE_THREADS") }}
# A container sees every core of its node; this is what it may use, rounded up.
- name: LATHE_ENGINE_THREADS
  valueFrom: {resourceFieldRef: {containerName: engine, resource: limits.cpu}}
{{- end }}
{{- range $name, $value := $settings }}
- {name: {{ $name }}, value: {{ $value | toString | quote }}}
{{- end }}
{{ include "lathe.storeKeys" . }}
{{- end -}}

{{- define "lathe.engineResources" -}}
{{- $resources := deepCopy (default (dict) .class.resources) -}}
{{- with .class.gpus -}}
{{- $gpu := dict (default "nvidia.com/gpu" $.class.gpuResource) (toString .) -}}
{{- $_ := set $resources "limits" (merge (deepCopy $gpu) (default (dict) $resources.limits)) -}}
{{- $_ := set $resources "requests" (merge (deepCopy $gpu) (default (dict) $resources.requests)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
