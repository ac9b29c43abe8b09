package dashboards

// An Alert is one of alerts/rules.yaml, by name.
type Alert string

// The alerts whose runbooks panels link to.
const (
	acceptQueueOverflow  Alert = "SockqAcceptQueueOverflow"
	acceptQueueNearFull  Alert = "SockqAcceptQueueNearFull"
	synQueueOverflow     Alert = "SockqSynQueueOverflow"
	synFlood             Alert = "SockqSynFlood"
	acceptWaitLong       Alert = "SockqAcceptWaitLong"
	listenerStalled      Alert = "SockqListenerStalled"
	backlogClamped       Alert = "SockqBacklogClamped"
	closeWaitLeak        Alert = "SockqCloseWaitLeak"
	timeWaitOverflow     Alert = "SockqTimeWaitOverflow"
	connectFailureRising Alert = "SockqConnectFailuresRising"
	auditDifference      Alert = "SockqAuditDifference"
	eventsLost           Alert = "SockqEventsLost"
	agentDown            Alert = "SockqAgentDown"
	agentDegraded        Alert = "SockqAgentDegraded"
)

// runbookBase is where the runbooks are read.
const runbookBase = "https://github.com/sockq/sockq/blob/main/alerts/runbooks/"

func (a Alert) runbook() string { return runbookBase + string(a) + ".md" }
