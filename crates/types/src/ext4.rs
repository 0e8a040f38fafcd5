//! What an ext4 says of itself, as far as host and guest ask. The fields and their places are those of the kernel's
//! Documentation/filesystems/ext4/super.rst. Whoever made the file system can write anything here.

/// Where on its disk the superblock lies, and how long it is, bytes.
pub const AT: u64 = 1024;
pub const LEN: usize = 1024;

const MAGIC: u16 = 0xEF53;
/// The largest block is 1024 << 6 bytes.
const LARGEST_SHIFT: u32 = 6;
/// `s_state`: unmounted in order, and: errors were met.
const VALID: u16 = 0b01;
const ERRORS: u16 = 0b10;
/// `s_feature_incompat`: the journal has something that is not in its place yet.
const RECOVER: u32 = 0x4;

#[derive(Clone, Copy, Debug)]
pub struct Superblock<'a>(&'a [u8; LEN]);

impl<'a> Superblock<'a> {
    /// `None`: it is none.
    #[must_use]
    pub fn of(bytes: &'a [u8; LEN]) -> Option<Self> {
        let found = Self(bytes);
        (found.short(0x38) == MAGIC).then_some(found)
    }

    /// Bytes of a block; `None`: of none that there is.
    #[must_use]
    pub fn block(self) -> Option<u64> {
        let shift = self.word(0x18);
        (shift <= LARGEST_SHIFT).then(|| 1024 << shift)
    }

    /// As Linux counts them, whether or not the upper half is said to count.
    #[must_use]
    pub fn blocks(self) -> u64 {
        u64::from(self.word(0x4)) | u64::from(self.word(0x150)) << 32
    }

    /// It was unmounted in order and without errors, and its journal is empty.
    #[must_use]
    pub fn is_clean(self) -> bool {
        self.short(0x3a) & (VALID | ERRORS) == VALID && self.word(0x60) & RECOVER == 0
    }

    fn short(self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    fn word(self, at: usize) -> u32 {
        u32::from_le_bytes([0, 1, 2, 3].map(|n| self.0[at + n]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_says_is_read_and_not_believed() {
        let mut bytes = [0; LEN];
        assert!(Superblock::of(&bytes).is_none());
        bytes[0x38..0x3a].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[0x4..0x8].copy_from_slice(&65_536_u32.to_le_bytes());
        bytes[0x18] = 2;
        let read = |bytes: &[u8; LEN]| {
            let found = Superblock::of(bytes).unwrap();
            (found.block(), found.blocks(), found.is_clean())
        };
        assert_eq!(read(&bytes), (Some(4096), 65_536, false));
        bytes[0x3a] = 1;
        bytes[0x150] = 1;
        assert_eq!(read(&bytes), (Some(4096), (1 << 32) + 65_536, true));
        for (at, with) in [(0x3a, 3), (0x60, 4)] {
            let mut other = bytes;
            other[at] = with;
            assert!(!read(&other).2, "{at:#x}");
        }
        bytes[0x18..0x1c].fill(0xff);
        bytes[0x150..0x154].fill(0xff);
        assert_eq!(read(&bytes).0, None);
    }
}
