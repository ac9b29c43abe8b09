#!/bin/bash
# Installs /root/sockq.deb on the machine that it runs on, uses it, and removes it
# again. What it found is in /root/found, the log of all in /root/log.
exec >/root/log 2>&1
set -ux
mkdir /root/found
cd /root/found

files() { find / -xdev \( -path /proc -o -path /sys -o -path /run -o -path /root -o -path /tmp -o -path /var/log -o -path /var/cache -o -path /var/lib/dpkg \) -prune -o -print | sort; }
# ready waits for the first census.
ready() {
	for _ in $(seq 100); do
		curl -sf localhost:10813/-/ready && return
		sleep 0.2
	done
}

# A container's sysfs does not have it.
mount -t tracefs tracefs /sys/kernel/tracing
files >before
dpkg -i /root/sockq.deb
ready
systemctl is-enabled sockq >enabled
ip netns add late # its name comes through, though sockq was there before
for _ in $(seq 100); do
	curl -s localhost:10813/metrics | grep -o 'sockq_tcp_sockets{.*netns="late",state="ESTABLISHED"} 0' >named && break
	sleep 0.2
done
ip netns delete late
systemctl is-active sockq >active
curl -s localhost:10813/metrics >metrics
cat "/proc/$(systemctl show -P MainPID sockq)/status" >status
bash -c 'source /usr/share/bash-completion/completions/sockq; COMP_WORDS=(sockq --max-p) COMP_CWORD=1
	_sockq_bash_autocomplete; echo "${COMPREPLY[@]}"' >completed
timeout 30 zsh -f >completed-by-zsh <<'END'
zmodload zsh/zpty
zpty shell 'TERM=vt100 zsh -f -i'
zpty -w shell "PS1=; autoload -Uz compinit; compinit -u -D; print re''ady"
zpty -r shell line '*ready*'
zpty -w -n shell $'sockq --max-p\t'
zpty -r shell line '*--max-processes*' && print -- --max-processes
END
man --warnings sockq >/dev/null 2>man-warnings
man sockq | grep -c -- --max-processes >man

echo 'ARGS="--no-such-flag"' >/etc/default/sockq
systemctl restart sockq
for _ in $(seq 100); do
	systemctl is-failed sockq && break
	sleep 0.2
done
systemctl show -P NRestarts sockq >restarts # it would not help
echo 'ARGS="--census.interval=1s"' >/etc/default/sockq
systemctl reset-failed sockq
systemctl restart sockq
ready
systemctl is-active sockq >active-again

for crash in 1 2; do # it comes back
	case $crash in
	1) kill -KILL "$(systemctl show -P MainPID sockq)" ;;
	2) kill -QUIT "$(systemctl show -P MainPID sockq)" ;; # as Go ends where it panics
	esac
	for _ in $(seq 100); do
		[ "$(systemctl show -P NRestarts sockq)" = $crash ] && break
		sleep 0.2
	done
	ready
done
systemctl is-active sockq >active-after-kill

# An upgrade asks nothing, keeps what was changed and starts the new binary.
before=$(systemctl show -P MainPID sockq)
dpkg -i /root/sockq.deb </dev/null
ready
cat /etc/default/sockq >default-after-upgrade
systemctl is-active sockq >active-after-upgrade
[ "$(systemctl show -P MainPID sockq)" = "$before" ] || echo restarted >restarted-by-upgrade
# What is disabled stays so.
systemctl disable sockq
dpkg -i /root/sockq.deb </dev/null
systemctl is-enabled sockq >enabled-after-disable
systemctl enable sockq
# with restarts sockq with a drop-in and these flags.
with() {
	rm -rf /etc/systemd/system/sockq.service.d
	mkdir /etc/systemd/system/sockq.service.d
	cp "/usr/share/doc/sockq/examples/$1.conf" /etc/systemd/system/sockq.service.d/
	echo "ARGS=\"--census.interval=1s ${2-}\"" >/etc/default/sockq
	systemctl daemon-reload
	systemctl restart sockq
}
# polled waits for series.
polled() {
	for _ in $(seq 100); do
		curl -s localhost:10813/metrics | grep "$1" && return
		sleep 0.2
	done
	curl -s localhost:10813/metrics | grep '^sockq_probe_attached'
}
status() { cat "/proc/$(systemctl show -P MainPID sockq)/status"; }

# It may enter a namespace that only a process leads to.
unshare --net sleep infinity &
until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
readlink "/proc/$!/ns/net" >nameless
with all-namespaces --audit.budget=1
polled "^sockq_audit_difference{.*netns=\"$(tr -cd 0-9 <nameless)\"}" >audited
status >status-audited
kill $!
# The container runtime's socket is root's.
curl -s localhost:10813/api/v1/snapshot | grep -o '"name":"pods",[^}]*' >pods-before
with pods
polled '^sockq_probe_attached{mechanism="cri",probe="pods"}' >pods
status >status-pods
with low-port --web.listen-address=:80
for _ in $(seq 100); do
	curl -sf localhost/-/ready && break
	sleep 0.2
done
curl -s localhost/metrics | grep -c ^sockq_tcp_sockets >low-port
status >status-low-port
# The key is root's alone.
cp -r /root/tls /etc/sockq
chmod 600 /etc/sockq/*
with tls
for _ in $(seq 100); do
	curl -sf --cacert /root/tls/ca.crt https://127.0.0.1:10813/-/ready && break
	sleep 0.2
done
curl -s --cacert /root/tls/ca.crt https://127.0.0.1:10813/metrics | grep -c ^sockq_tcp_sockets >tls
status >status-tls
rm -r /etc/systemd/system/sockq.service.d /etc/sockq
systemctl daemon-reload
journalctl -u sockq --no-pager -o cat >journal

dpkg -r sockq
systemctl is-active sockq >active-after-remove
cp /etc/default/sockq default-after-remove
dpkg -P sockq
files >after
dpkg-query -W sockq >installed-after
getent passwd sockq >user-after
ls -A /var/lib/private /var/cache/private /var/log/private | grep sockq >left-after
systemctl exit 0
