{{/*
What the agents' pods and the cleaning ones have in common: both do the same things to a node's kernel.

Not `privileged`. The capabilities, each seen to be missed when it is not there:
  NET_ADMIN  devices, routes, rules, packet marks, attaching the gate, settings under /proc/sys/net
  NET_RAW    the probes that find out how large a packet gets through a tunnel
  BPF        the gate's program and maps
  PERFMON    the kernel's verifier lets a program compare packet pointers only with it
Neither SYS_ADMIN nor SYS_MODULE: the kernel loads the modules for WireGuard, VXLAN and Geneve by itself.
*/}}
{{- define "shroud.securityContext" -}}
runAsUser: 0
runAsGroup: 0
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  add: [NET_ADMIN, NET_RAW, BPF, PERFMON]
{{- with .Values.seccompProfile }}
seccompProfile:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.seLinuxOptions }}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/*
The folders of the node. Those below /host are where neither AppArmor's default profile nor the runtime's read-only /proc/sys keeps them
from being written: the profile denies writing to /sys/fs by that name.
*/}}
{{- define "shroud.mounts" -}}
- { name: config, mountPath: /etc/shroud, readOnly: true }
- { name: state, mountPath: /var/lib/shroud }
- { name: run, mountPath: /run/shroud }
- { name: pins, mountPath: /host/sys/fs/bpf/shroud }
- { name: settings, mountPath: /host/proc/sys/net }
{{- if ne .Values.config.encryption.backend "kernel" }}
- { name: tun, mountPath: /dev/net }
- { name: wireguard, mountPath: /run/wireguard }
{{- end }}
{{- if .Values.config.cni.install }}
- { name: cni, mountPath: {{ .Values.config.cni.confDir }} }
{{- end }}
{{- end -}}

{{- define "shroud.volumes" -}}
- name: config
  configMap: { name: {{ include "shroud.name" . }}-config }
# The node's key and what it last knew of the mesh; outlives the pod and the release.
- name: state
  hostPath: { path: /var/lib/shroud, type: DirectoryOrCreate }
# The status socket, and the lock that keeps a second agent waiting.
- name: run
  hostPath: { path: /run/shroud, type: DirectoryOrCreate }
# The gate's pins, and nobody else's. Cannot be made where no BPF file system is mounted; systemd mounts one.
- name: pins
  hostPath: { path: /sys/fs/bpf/shroud, type: DirectoryOrCreate }
- name: settings
  hostPath: { path: /proc/sys/net, type: Directory }
{{- if ne .Values.config.encryption.backend "kernel" }}
# For the userspace data plane: its device's door, and the socket at which `wg` looks.
- name: tun
  hostPath: { path: /dev/net, type: DirectoryOrCreate }
- name: wireguard
  hostPath: { path: /run/wireguard, type: DirectoryOrCreate }
{{- end }}
{{- if .Values.config.cni.install }}
- name: cni
  hostPath: { path: {{ .Values.config.cni.confDir }}, type: DirectoryOrCreate }
{{- end }}
{{- end -}}
