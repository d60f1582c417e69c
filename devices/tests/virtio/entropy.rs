//! Random bytes.

use std::sync::Arc;

use entresol_devices::virtio::Broken;
use entresol_devices::virtio::entropy::EntropySource;

use crate::driver::{BUFFERS, Driver};
use crate::host::Counter;

fn bench() -> Driver<EntropySource<Arc<Counter>>> {
    Driver::new(EntropySource::new(Arc::new(Counter::default())).unwrap(), 0)
}

#[test]
fn buffers_are_filled_with_fresh_bytes() {
    let mut driver = bench();
    driver.submit(0, &[(BUFFERS, 20, true), (BUFFERS + 100, 12, true)]);
    assert_eq!(driver.used(0), Some((0, 32)));
    assert_eq!(driver.memory.peek(BUFFERS, 21), [(1..=20).collect(), vec![0]].concat());
    assert_eq!(driver.memory.peek(BUFFERS + 100, 12), (21..=32).collect::<Vec<u8>>());
    driver.submit(0, &[(BUFFERS, 1, true)]);
    assert_eq!(driver.memory.peek(BUFFERS, 1), [33]);
}

#[test]
fn a_huge_buffer_is_filled_in_part() {
    let mut driver = bench();
    driver.submit(0, &[(BUFFERS, 1 << 20, true)]);
    let (_, bytes) = driver.used(0).unwrap();
    assert_eq!(bytes, 4096);
    assert!(driver.memory.peek(BUFFERS, 4096).iter().all(|byte| *byte != 0));
    assert_eq!(driver.memory.peek(BUFFERS + 4096, 1), [0]);
}

#[test]
fn a_buffer_without_room_breaks_the_device() {
    let mut driver = bench();
    driver.submit(0, &[(BUFFERS, 64, false)]);
    assert_eq!(driver.device.broken(), Some(Broken::Request));
}
