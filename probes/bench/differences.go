package main

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// work is what is done under attachments, on the namespace's thread.
type work struct {
	n     *namespace
	what  string
	count int // of connections or calls, in each batch
	do    func(count int) error
}

// warm is how many come before those that are measured.
func (w *work) warm() int { return w.count / 10 }

// difference is what an attachment adds to one connection or call.
type difference struct {
	*attachment
	bare, more samples // nanoseconds, of the work without it and on top of that
}

// share is the addition in per cent of the bare work.
func (d *difference) share() samples {
	share := d.more.over(d.bare)
	for i := range share {
		share[i] *= 100
	}
	return share
}

// differences measures the work under each of the attachments, those that are
// not nil, between two times without any, in another order each round: the speed
// of a machine changes by more than what is looked for, but not within so short
// a time.
func (b *bench) differences(w *work, rounds int, attachments ...*attachment) ([]*difference, error) {
	progress("measuring: %s", w.what)
	var all []*difference
	for _, a := range attachments {
		if a != nil {
			all = append(all, &difference{attachment: a})
		}
	}
	before, err := b.batch(w)
	if err != nil {
		return nil, err
	}
	for round := range rounds {
		for _, i := range rand.Perm(len(all)) {
			d := all[i]
			if d.rounds > 0 && round >= d.rounds {
				continue
			}
			detach, err := d.attach()
			if err != nil {
				return nil, fmt.Errorf("attach %s: %w", d.name, err)
			}
			with, err := b.batch(w)
			if err := detach(); err != nil {
				return nil, fmt.Errorf("detach %s: %w", d.name, err)
			}
			if err != nil {
				return nil, err
			}
			after, err := b.batch(w)
			if err != nil {
				return nil, err
			}
			bare := (before + after) / 2
			d.bare, d.more = append(d.bare, bare), append(d.more, with-bare)
			before = after
		}
	}
	return all, nil
}

// batch is the CPU time that the work takes, with what the processes of the
// namespace use meanwhile, in nanoseconds a piece.
func (b *bench) batch(w *work) (took float64, err error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	err = w.n.do(func() error {
		return pinned(func() error {
			if err := w.do(w.warm()); err != nil {
				return err
			}
			before, err := w.n.usedTime()
			if err != nil {
				return err
			}
			if err := w.do(w.count); err != nil {
				return err
			}
			after, err := w.n.usedTime()
			took = float64(after-before) / float64(w.count)
			return err
		})
	})
	return took, err
}

// usedTime is the CPU time of the calling thread and of the namespace's processes.
func (n *namespace) usedTime() (time.Duration, error) {
	total, err := threadTime()
	if err != nil {
		return 0, err
	}
	for _, cmd := range n.held {
		t, err := processTime(cmd.Process.Pid)
		if err != nil {
			return 0, err
		}
		total += t
	}
	return total, nil
}
