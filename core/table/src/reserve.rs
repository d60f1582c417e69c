//! Table pages in hand, before anything is changed.

use entresol_addr::Pfn;

/// Frames for new tables: zeroed, nobody else's. One operation needs at most [`Reserve::MOST`].
///
/// The caller fills it before an operation and takes back what is left after it, on success and on every error.
#[must_use = "frames that stay in a dropped reserve are lost"]
#[derive(Debug, Default)]
pub struct Reserve {
    frames: [Pfn; Self::MOST],
    len: u8,
}

impl Reserve {
    /// Tables below a level-0 root: levels 1, 2 and 3.
    pub const MOST: usize = 3;

    /// Nothing in it.
    pub const fn new() -> Self {
        Self { frames: [Pfn::new(0); Self::MOST], len: 0 }
    }

    /// Frames in it.
    #[inline]
    pub const fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are none.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a zeroed frame.
    ///
    /// # Errors
    ///
    /// The frame, if the reserve is full.
    pub fn push(&mut self, frame: Pfn) -> Result<(), Pfn> {
        let slot = self.frames.get_mut(self.len as usize).ok_or(frame)?;
        *slot = frame;
        self.len += 1;
        Ok(())
    }

    /// Takes a zeroed frame out.
    pub fn pop(&mut self) -> Option<Pfn> {
        self.len = self.len.checked_sub(1)?;
        Some(self.frames[self.len as usize])
    }

    /// Puts a frame back that this operation took out; it is zeroed again.
    pub(crate) fn put_back(&mut self, frame: Pfn) {
        self.push(frame).expect("a frame goes back to where it was taken from");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_and_no_more_fits() {
        let mut reserve = Reserve::new();
        for frame in 1..=3 {
            assert_eq!(reserve.push(Pfn::new(frame)), Ok(()));
        }
        assert_eq!(reserve.push(Pfn::new(4)), Err(Pfn::new(4)));
        assert_eq!(reserve.len(), Reserve::MOST);
        for frame in [3, 2, 1] {
            assert_eq!(reserve.pop(), Some(Pfn::new(frame)));
        }
        assert!(reserve.is_empty() && reserve.pop().is_none());
    }
}
