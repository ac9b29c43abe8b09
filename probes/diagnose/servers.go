package diagnose

import (
	"slices"
	"strings"
)

// server is where a server's backlog is set, and what it asks for by default.
type server struct {
	comm    string // how its processes are called, without a version or a role
	name    string
	asks    uint64 // 0: it depends
	setting string
}

var servers = []server{
	{"nginx", "nginx", 511, "backlog= of the listen directive"},
	{"apache2", "Apache", 511, "ListenBackLog"},
	{"httpd", "Apache", 511, "ListenBackLog"},
	{"redis-server", "Redis", 511, "tcp-backlog"},
	{"node", "Node.js", 511, "the backlog of server.listen()"},
	{"php-fpm", "PHP-FPM", 511, "listen.backlog"},
	{"java", "Tomcat", 100, "acceptCount"},
	{"java", "Java", 50, "the backlog of ServerSocket"},
	{"python", "Python's socketserver", 5, "request_queue_size"},
	{"python", "asyncio", 100, "the backlog of create_server()"},
	{"python", "Python", 128, "the argument of socket.listen()"},
	{"gunicorn", "Gunicorn", 2048, "backlog"},
	{"uvicorn", "Uvicorn", 2048, "--backlog"},
	{"uwsgi", "uWSGI", 100, "listen"},
	{"haproxy", "HAProxy", 0, "backlog, by default maxconn"},
}

// setting says where the backlog is set, by the process and by what it asked for.
func (v *view) setting() string {
	asked, known := v.asked()
	var is []string
	for _, s := range servers {
		switch {
		case !called(v.Process, s.comm):
		case s.asks == 0 || known && s.asks == asked: // surely this one
			return " (" + s.name + ": " + s.setting + ")"
		default:
			is = append(is, s.name+": "+s.setting)
		}
	}
	if len(is) > 0 {
		return " (" + strings.Join(is, "; ") + ")"
	}
	if !known {
		return ""
	}
	if v.Somaxconn >= 0 && asked == uint64(v.Somaxconn) {
		return " (it asked for net.core.somaxconn, as Go does: there the sysctl and a restart are enough)"
	}
	if v.Process != "" {
		return ""
	}
	for _, s := range servers {
		if s.asks == asked && asked > 0 && !slices.Contains(is, s.name) {
			is = append(is, s.name)
		}
	}
	if len(is) == 0 {
		return ""
	}
	return " (" + count(asked) + " is the default of " + strings.Join(is, ", ") + ")"
}

// called tells whether a process is a server's: nginx, python3.11, gunicorn: worker,
// but not node_exporter for node.
func called(process, comm string) bool {
	rest, ok := strings.CutPrefix(process, comm)
	return ok && (rest == "" || strings.ContainsRune("0123456789:-. ", rune(rest[0])))
}
