package sockdiag

import "math/bits"

const (
	minSlots = 1 << 10 // 8 KiB
	// maxSlots bounds the memory to 64 MiB.
	maxSlots = 1 << 23
	// keepSlots is how much is kept between dumps in any case.
	keepSlots = 1 << 17 // 1 MiB
)

// cookieSet is a set of socket cookies with open addressing.
type cookieSet struct {
	slots []uint64 // a power of two of them, 0 is free
	used  int
	shift uint8 // 64 - log2(len(slots))
	limit int   // maxSlots, but for tests
}

// reset empties the set. It gives memory back if the last use needed less than
// an eighth of it.
func (c *cookieSet) reset() {
	if len(c.slots) > keepSlots && c.used < len(c.slots)/8 {
		c.slots = nil
	}
	clear(c.slots)
	c.used = 0
}

// add tells whether cookie was not in the set yet and puts it in. 0 is no
// cookie and always new. A set that outgrows its limit forgets everything else.
func (c *cookieSet) add(cookie uint64) bool {
	if cookie == 0 {
		return true
	}
	if c.slots == nil {
		c.resize(minSlots)
	}
	if !c.insert(cookie) {
		return false
	}
	c.used++
	if c.used > len(c.slots)/4*3 {
		c.grow(cookie)
	}
	return true
}

func (c *cookieSet) insert(cookie uint64) bool {
	mask := uint64(len(c.slots) - 1)
	// Cookies are nearly sequential; Fibonacci hashing spreads them.
	for i := cookie * 0x9e3779b97f4a7c15 >> c.shift; ; i = (i + 1) & mask {
		switch c.slots[i] {
		case 0:
			c.slots[i] = cookie
			return true
		case cookie:
			return false
		}
	}
}

func (c *cookieSet) grow(newest uint64) {
	limit := c.limit
	if limit == 0 {
		limit = maxSlots
	}
	old := c.slots
	if len(old) >= limit {
		clear(old)
		c.insert(newest)
		c.used = 1
		return
	}
	c.resize(2 * len(old))
	for _, cookie := range old {
		if cookie != 0 {
			c.insert(cookie)
		}
	}
}

// resize makes n empty slots, a power of two.
func (c *cookieSet) resize(n int) {
	c.slots = make([]uint64, n)
	c.shift = uint8(64 - bits.TrailingZeros(uint(n)))
}
