package owner

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
)

const (
	// maxPodList bounds the kubelet's answer, in bytes, maxPod what one pod takes of
	// it: 10 to 40 kB, and no more than etcd keeps in one object, 1.5 MiB.
	maxPodList = 32 << 20
	maxPod     = 2 << 20

	maxTokenBytes = 64 << 10
)

// kubeletSource asks the kubelet for its pods.
type kubeletSource struct {
	url, token string
	shown      string // the URL without what may be secret: user, password, query
	client     *http.Client
}

func (*kubeletSource) name() string { return "kubelet" }

func newKubeletSource(opts *Options) (*kubeletSource, error) {
	u, err := url.Parse(opts.Kubelet)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		// Not shown: what is no URL may still have a password.
		return nil, errors.New("kubelet: give a URL such as https://127.0.0.1:10250/pods")
	}
	shown := (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
	if u.Scheme == "http" && (opts.KubeletToken != "" || opts.KubeletCA != "" || opts.KubeletInsecure) {
		return nil, fmt.Errorf("kubelet %q: a token and certificates need https", shown)
	}
	config := &tls.Config{InsecureSkipVerify: opts.KubeletInsecure}
	if opts.KubeletCA != "" {
		pem, err := os.ReadFile(opts.KubeletCA)
		if err != nil {
			return nil, fmt.Errorf("kubelet's certificates: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("kubelet's certificates: %s has none", opts.KubeletCA)
		}
	}
	return &kubeletSource{url: opts.Kubelet, token: opts.KubeletToken, shown: shown, client: &http.Client{
		// One request now and then, to this node.
		Transport:     &http.Transport{TLSClientConfig: config, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// try counts the tokens that may be read.
func (k *kubeletSource) try() (int, error) {
	if k.token == "" {
		return 1, nil
	}
	if _, err := readToken(k.token); err != nil {
		return 0, err
	}
	return 1, nil
}

func (k *kubeletSource) read(ctx context.Context, t *podTable) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, k.url, nil)
	if err != nil {
		return err
	}
	if k.token != "" {
		token, err := readToken(k.token)
		if err != nil {
			return fmt.Errorf("kubelet's token: %w", err)
		}
		request.Header.Set("Authorization", "Bearer "+token)
	}
	response, err := k.client.Do(request)
	if err != nil {
		var whole *url.Error // which shows the query
		if errors.As(err, &whole) {
			err = whole.Err
		}
		return fmt.Errorf("ask %s: %w", k.shown, err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("ask %s: %s", k.shown, printable(response.Status))
	}
	if err := readPods(response.Body, t); err != nil {
		return fmt.Errorf("read the pods of %s: %w", k.shown, err)
	}
	return nil
}

// readPods reads no more than maxPodList.
func readPods(r io.Reader, t *podTable) error {
	list := &io.LimitedReader{R: r, N: maxPodList}
	onePod := &io.LimitedReader{R: list}
	err := decodePods(onePod, t)
	switch {
	case err == nil:
		return nil
	case list.N <= 0:
		return fmt.Errorf("it has more than %d MiB", maxPodList>>20)
	case onePod.N <= 0:
		return fmt.Errorf("a pod has more than %d MiB", maxPod>>20)
	}
	return err
}

// readToken reads it anew each time, since Kubernetes writes a new one every hour.
func readToken(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	token, err := io.ReadAll(io.LimitReader(f, maxTokenBytes))
	return strings.TrimSpace(string(token)), err
}

// kubeletPod is what is read of a v1.Pod.
type kubeletPod struct {
	Metadata struct{ Name, Namespace, UID string }
	Spec     struct{ HostNetwork bool }
	Status   struct {
		ContainerStatuses, InitContainerStatuses, EphemeralContainerStatuses []struct{ Name, ContainerID string }
	}
}

// decodePods reads a v1.PodList one pod after the other, and of r no more than maxPod
// for each.
func decodePods(r *io.LimitedReader, t *podTable) error {
	r.N = maxPod
	d := json.NewDecoder(r)
	if err := expect(d, json.Delim('{')); err != nil {
		return err
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return err
		}
		if key != "items" {
			var skipped json.RawMessage
			if err := d.Decode(&skipped); err != nil {
				return err
			}
			continue
		}
		switch list, err := d.Token(); {
		case err != nil:
			return err
		case list == nil:
			continue // no pods
		case list != json.Delim('['):
			return errNoPodList
		}
		for d.More() {
			var p kubeletPod
			if err := d.Decode(&p); err != nil {
				return err
			}
			p.addTo(t)
			r.N = maxPod
		}
		if err := expect(d, json.Delim(']')); err != nil {
			return err
		}
	}
	return expect(d, json.Delim('}'))
}

var errNoPodList = errors.New("this is no list of pods")

func expect(d *json.Decoder, want json.Delim) error {
	got, err := d.Token()
	if err == nil && got != want {
		err = errNoPodList
	}
	return err
}

func (p *kubeletPod) addTo(t *podTable) {
	of := pod{
		uid: printable(p.Metadata.UID), name: printable(p.Metadata.Name), namespace: printable(p.Metadata.Namespace),
		hostNetwork: p.Spec.HostNetwork,
	}
	t.addPod(of)
	s := &p.Status
	for _, statuses := range [][]struct{ Name, ContainerID string }{s.ContainerStatuses, s.InitContainerStatuses, s.EphemeralContainerStatuses} {
		for _, c := range statuses {
			runtime, id, _ := strings.Cut(c.ContainerID, "://")
			t.add(id, container{name: printable(c.Name), runtime: printable(runtime), pod: of})
		}
	}
}
