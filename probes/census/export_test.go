package census

// FillSockets leaves no place for a connection in the next Read.
func (h *Holders) FillSockets() error {
	keys := make([]uint64, h.objects.Held.MaxEntries())
	for i := range keys {
		keys[i] = uint64(i) + 1 // no address
	}
	_, err := h.objects.Held.BatchUpdate(keys, make([]holdersHeldSocket, len(keys)), nil)
	return err
}

// FillProcesses leaves no place for a process.
func (h *Holders) FillProcesses() error {
	if err := h.reset(); err != nil {
		return err
	}
	keys := make([]holdersProcessKey, h.objects.Slots.MaxEntries())
	for i := range keys {
		keys[i].Inum = uint32(i) // with PID 0
	}
	_, err := h.objects.Slots.BatchUpdate(keys, make([]uint32, len(keys)), nil)
	return err
}

// LoseSlots takes the slot of every second process of the last Read back.
func (h *Holders) LoseSlots() error {
	for i := 0; i < len(h.records); i += 2 {
		if err := h.objects.Slots.Delete(h.records[i].Key); err != nil {
			return err
		}
	}
	return nil
}
