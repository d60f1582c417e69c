//! Linux's arm64 `Image` header (Documentation/arch/arm64/booting.rst, "Call the kernel image").

use super::{KernelError, le64};

/// Bytes of the header.
const HEADER: u64 = 64;
/// `ARM\x64` at byte 56.
const MAGIC: &[u8] = b"ARM\x64";
/// text_offset of kernels before 3.17, which leave image_size 0 and text_offset unreliable.
const OLD_TEXT_OFFSET: u64 = 0x8_0000;

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// Bytes from a 2 MiB aligned base to the image.
    pub text_offset: u64,
    /// Bytes that the image needs from its first, BSS included; 0 if the header does not say.
    pub image_size: u64,
    /// Flags: bit 0 big-endian, bits 2:1 page size, bit 3 anywhere in memory.
    pub flags: u64,
}

impl Image {
    /// The header, if `head` begins with one.
    ///
    /// # Errors
    ///
    /// Contents that begin like an Image and end inside the header.
    pub(super) fn parse(head: &[u8]) -> Result<Option<Self>, KernelError> {
        if (head.len() as u64) < HEADER {
            let (need, have) = (HEADER, head.len() as u64);
            return if head.starts_with(b"MZ") {
                Err(KernelError::Truncated { what: "Image header", need, have })
            } else {
                Ok(None)
            };
        }
        if &head[56..60] != MAGIC {
            return Ok(None);
        }
        let (Some(text_offset), Some(image_size), Some(flags)) = (le64(head, 8), le64(head, 16), le64(head, 24)) else {
            return Ok(None);
        };
        let text_offset = if image_size == 0 { OLD_TEXT_OFFSET } else { text_offset };
        Ok(Some(Self { text_offset, image_size, flags }))
    }
}
