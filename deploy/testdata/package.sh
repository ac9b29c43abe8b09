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
systemctl is-active sockq >active
curl -s localhost:10813/metrics >metrics
cat "/proc/$(systemctl show -P MainPID sockq)/status" >status
bash -c 'source /usr/share/bash-completion/completions/sockq; COMP_WORDS=(sockq --max-p) COMP_CWORD=1
	_sockq_bash_autocomplete; echo "${COMPREPLY[@]}"' >completed

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

kill -9 "$(systemctl show -P MainPID sockq)" # it comes back
for _ in $(seq 100); do
	[ "$(systemctl show -P NRestarts sockq)" = 1 ] && break
	sleep 0.2
done
ready
systemctl is-active sockq >active-after-kill

dpkg -i --force-confold /root/sockq.deb # an upgrade
ready
cat /etc/default/sockq >default-after-upgrade
systemctl is-active sockq >active-after-upgrade
# The drop-in lets it enter a namespace that only a process leads to.
mkdir /etc/systemd/system/sockq.service.d
cp /usr/share/doc/sockq/examples/all-namespaces.conf /etc/systemd/system/sockq.service.d/
echo 'ARGS="--census.interval=1s --audit.budget=1"' >/etc/default/sockq
unshare --net sleep infinity &
until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
readlink "/proc/$!/ns/net" >nameless
systemctl daemon-reload
systemctl restart sockq
ready
for _ in $(seq 100); do
	curl -s localhost:10813/metrics | grep "^sockq_audit_difference{.*netns=\"$(tr -cd 0-9 <nameless)\"}" >audited && break
	sleep 0.2
done
cat "/proc/$(systemctl show -P MainPID sockq)/status" >status-audited
kill $!
rm -r /etc/systemd/system/sockq.service.d
journalctl -u sockq --no-pager -o cat >journal

dpkg -r sockq
systemctl is-active sockq >active-after-remove
dpkg -P sockq
files >after
dpkg-query -W sockq >installed-after
getent passwd sockq >user-after
systemctl exit 0
