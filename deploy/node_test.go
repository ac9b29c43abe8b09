package deploy_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// cluster is a control plane and one node, all on this machine, with directories,
// ports and a network for pods of its own. It runs in a mount namespace made for it,
// where /run/containerd and /run/netns are empty.
type cluster struct {
	t          *testing.T
	dir        string
	node       string // its address
	api        string // URL of the API server
	containerd *part
	kubelet    *part
	authority  authority
	namespace  string // sockq's
}

const (
	nodeName   = "node-1"
	podNetwork = "10.244.77.0/24"
	bridge     = "sockq-cni0"
	busyboxTag = "sockq.test/busybox:1"
)

// startCluster starts one whose pods can be of these images.
func startCluster(t *testing.T, busybox, sockq string) *cluster {
	t.Helper()
	dir, err := os.MkdirTemp("", "sockq") // short: paths of sockets have 108 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, dir: dir, node: nodeAddress(t), authority: newAuthority(t, dir), namespace: "sockq"}
	t.Cleanup(c.clean)
	c.startControlPlane()
	c.startNode(busybox)
	c.importImage(sockq, imageTag, nextTag, overlayTag)
	return c
}

// nodeAddress is one of this machine that pods can reach.
func nodeAddress(t *testing.T) string {
	t.Helper()
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.To4() != nil && ip.IP.IsGlobalUnicast() {
			return ip.IP.String()
		}
	}
	t.Fatal("this machine has no address that pods could reach")
	return ""
}

// part is a program of the cluster.
type part struct {
	t    *testing.T
	args []string
	log  *os.File
	cmd  *exec.Cmd
}

// start runs a part of the cluster until the test ends. Those that were started last
// end first.
func (c *cluster) start(args ...string) *part {
	c.t.Helper()
	log, err := os.Create(filepath.Join(c.dir, args[0]+".log"))
	if err != nil {
		c.t.Fatal(err)
	}
	p := &part{t: c.t, args: args, log: log}
	p.begin()
	c.t.Cleanup(func() {
		p.end()
		log.Close()
		if p.t.Failed() {
			p.t.Logf("%s said\n%s", args[0], tail(log.Name(), 10))
		}
	})
	return p
}

func (p *part) begin() {
	p.t.Helper()
	p.cmd = exec.Command(p.args[0], p.args[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
}

func (p *part) end() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	late := time.AfterFunc(20*time.Second, func() { _ = p.cmd.Process.Kill() })
	defer late.Stop()
	_ = p.cmd.Wait()
}

func tail(path string, lines int) string {
	data, _ := os.ReadFile(path)
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func (c *cluster) write(name, text string) string {
	c.t.Helper()
	path := filepath.Join(c.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		c.t.Fatal(err)
	}
	return path
}

// clean leaves nothing of the cluster on this machine.
func (c *cluster) clean() {
	_ = exec.Command("ip", "link", "delete", bridge).Run() // there only if a pod was
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if path := strings.Fields(line)[1]; strings.HasPrefix(path, c.dir+"/") {
			_ = syscall.Unmount(path, syscall.MNT_DETACH) // with all below it
		}
	}
	if err := os.RemoveAll(c.dir); err != nil {
		c.t.Error(err)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/k8s.io", "/sys/fs/cgroup/*/k8s.io"} {
		groups, _ := filepath.Glob(pattern)
		for _, group := range groups {
			_ = os.Remove(group) // unless somebody else's containers are in it
		}
	}
}

// removeContainers ends what would outlive containerd.
func (c *cluster) removeContainers() {
	tasks, err := command(nil, "ctr", "--namespace", "k8s.io", "tasks", "list", "--quiet")
	if err != nil {
		c.t.Errorf("list containers: %v: %s", err, tasks)
	}
	for _, id := range strings.Fields(tasks) {
		if out, err := command(nil, "ctr", "--namespace", "k8s.io", "tasks", "delete", "--force", id); err != nil {
			c.t.Errorf("end container %s: %v: %s", id, err, out)
		}
	}
}

// freePorts are ports of this machine on which nobody listens.
func freePorts(t *testing.T, n int) (ports []string) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		ports = append(ports, port)
	}
	return ports
}

func (c *cluster) startControlPlane() {
	t := c.t
	t.Helper()
	ports := freePorts(t, 5)
	etcd, peer, api := "http://127.0.0.1:"+ports[0], "http://127.0.0.1:"+ports[1], ports[2]
	c.api = "https://127.0.0.1:" + api
	c.start("etcd", "--data-dir", c.dir+"/etcd", "--listen-client-urls", etcd, "--advertise-client-urls", etcd,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)

	serving := c.authority.issue(t, "apiserver", pkix.Name{CommonName: "kube-apiserver"}, "127.0.0.1", c.node, "10.96.0.1")
	admin := c.authority.issue(t, "admin", pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}})
	c.start("kube-apiserver",
		"--etcd-servers="+etcd, "--bind-address=127.0.0.1", "--secure-port="+api, "--advertise-address="+c.node, "--service-cluster-ip-range=10.96.0.0/24",
		"--tls-cert-file="+serving+".crt", "--tls-private-key-file="+serving+".key", "--client-ca-file="+c.authority.path+".crt",
		"--kubelet-client-certificate="+admin+".crt", "--kubelet-client-key="+admin+".key", "--kubelet-certificate-authority="+c.authority.path+".crt",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+serving+".key", "--service-account-signing-key-file="+serving+".key",
		"--kubelet-preferred-address-types=InternalIP", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged")
	kubeconfig := c.kubeconfig("admin", admin)
	t.Setenv("KUBECONFIG", kubeconfig)
	eventually(t, time.Minute, "the API server is ready", func() error {
		_, err := c.try("get", "--raw", "/readyz")
		return err
	})
	c.start("kube-controller-manager", "--kubeconfig="+kubeconfig, "--bind-address=127.0.0.1", "--secure-port="+ports[3], "--leader-elect=false",
		"--flex-volume-plugin-dir="+c.dir+"/plugins", "--service-account-private-key-file="+serving+".key", "--root-ca-file="+c.authority.path+".crt")
	c.start("kube-scheduler", "--kubeconfig="+kubeconfig, "--bind-address=127.0.0.1", "--secure-port="+ports[4], "--leader-elect=false")
}

func (c *cluster) kubeconfig(name, certificate string) string {
	return c.write(name+".kubeconfig", fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, certificate-authority: %s.crt}}]
users: [{name: user, user: {client-certificate: %[3]s.crt, client-key: %[3]s.key}}]
contexts: [{name: test, context: {cluster: test, user: user}}]
current-context: test
`, c.api, c.authority.path, certificate))
}

// On a machine where nobody may lower oom_score_adj.
const containerdConfig = `version = 2
root = "DIR/containerd"
state = "/run/containerd"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "IMAGE"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "DIR/cni"
`

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: AUTHORITY.crt}
authorization: {mode: Webhook}
tlsCertFile: SERVING.crt
tlsPrivateKeyFile: SERVING.key
address: NODE
port: PORT
healthzPort: 0
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
localStorageCapacityIsolation: false
failSwapOn: false
evictionHard: {memory.available: 1Mi}
imageGCHighThresholdPercent: 100
podLogsDir: DIR/logs
volumePluginDir: DIR/plugins
syncFrequency: 5s
`

func (c *cluster) startNode(busybox string) {
	t := c.t
	t.Helper()
	port := freePorts(t, 1)[0]
	serving := c.authority.issue(t, "kubelet-serving", pkix.Name{CommonName: nodeName}, c.node)
	client := c.authority.issue(t, "kubelet", pkix.Name{CommonName: "system:node:" + nodeName, Organization: []string{"system:nodes"}})
	fill := strings.NewReplacer("DIR", c.dir, "IMAGE", busyboxTag, "AUTHORITY", c.authority.path, "SERVING", serving, "NODE", c.node, "PORT", port)
	c.write("cni/10-bridge.conflist", fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "sockq", "plugins": [
  {"type": "bridge", "bridge": %q, "isGateway": true, "ipMasq": false,
   "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`, bridge, c.dir+"/ipam", podNetwork))
	c.write("containerd.toml", fill.Replace(containerdConfig))
	c.containerd = c.start("containerd", "--config", c.dir+"/containerd.toml")
	c.awaitContainerd()
	t.Cleanup(c.removeContainers)
	c.importImage(busybox, busyboxTag)
	c.kubelet = c.start("kubelet", "--kubeconfig="+c.kubeconfig("kubelet", client), "--config="+c.write("kubelet.yaml", fill.Replace(kubeletConfig)),
		"--root-dir="+c.dir+"/kubelet", "--cert-dir="+c.dir+"/kubelet-pki", "--hostname-override="+nodeName, "--node-ip="+c.node)
	eventually(t, time.Minute, "the node is ready", func() error {
		_, err := c.try("wait", "--for=condition=Ready", "node/"+nodeName, "--timeout=5s")
		return err
	})
}

func (c *cluster) awaitContainerd() {
	c.t.Helper()
	eventually(c.t, time.Minute, "containerd answers", func() error {
		_, err := command(nil, "ctr", "version")
		return err
	})
}

// kubectl runs it, and ends the test where it fails.
func (c *cluster) kubectl(args ...string) string {
	c.t.Helper()
	out, err := c.try(args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

func (c *cluster) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "kubectl", args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

func (c *cluster) apply(manifest string) {
	c.t.Helper()
	mustRun(c.t, []byte(manifest), "kubectl", "apply", "--server-side", "--validate=strict", "-f", "-")
}

func eventually(t *testing.T, within time.Duration, what string, check func() error) {
	t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(200 * time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v: %v", what, within, err)
		}
	}
}

// authority signs certificates, which are kept with their keys in files.
type authority struct {
	path        string
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, dir string) authority {
	t.Helper()
	a := authority{path: filepath.Join(dir, "ca")}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	a.certificate = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	a.write(t, a.path, a.certificate, a.key)
	return a
}

// issue writes NAME.crt and NAME.key for a client or, with addresses, a server.
func (a *authority) issue(t *testing.T, name string, who pkix.Name, addresses ...string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	certificate := &x509.Certificate{
		SerialNumber: serial, Subject: who, NotBefore: a.certificate.NotBefore, NotAfter: a.certificate.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	for _, address := range addresses {
		certificate.IPAddresses = append(certificate.IPAddresses, net.ParseIP(address))
	}
	path := filepath.Join(filepath.Dir(a.path), name)
	a.write(t, path, certificate, key)
	return path
}

func (a *authority) write(t *testing.T, path string, certificate *x509.Certificate, key *ecdsa.PrivateKey) {
	t.Helper()
	signed, err := x509.CreateCertificate(rand.Reader, certificate, a.certificate, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for ending, block := range map[string]*pem.Block{".crt": {Type: "CERTIFICATE", Bytes: signed}, ".key": {Type: "EC PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(path+ending, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// importImage gives an image to containerd, as no registry could here. Its last names are
// further ones.
func (c *cluster) importImage(archive, name string, names ...string) {
	c.t.Helper()
	mustRun(c.t, nil, "ctr", "--namespace", "k8s.io", "images", "import", archive)
	for _, other := range names {
		mustRun(c.t, nil, "ctr", "--namespace", "k8s.io", "images", "tag", name, other)
	}
}
