//! What two relatives do not share, beside what was logged.

use std::vec::Vec;

use entresol_addr::Gpa;
use entresol_backing::Policy;
use entresol_slot::{Hint, SlotFlags};

use super::{FRAMES, child_object, end, gpa, leaf, load, settled, store, with_memory};
use crate::tests::{CPU, RAM, host, slot};

/// Copies are logged as writes, entries of what is shared are not writable under logging (INV-4), and the log names what
/// differs from a relative that nobody writes.
#[test]
fn the_log_and_the_difference_name_the_same_pages() {
    for policy in [Policy::Pages, Policy::Blocks] {
        let host = host(8192);
        let (parent, object) = with_memory(&host, policy);
        for frame in 0..40 {
            store(&parent, gpa(frame), 1);
        }
        let child = parent.fork(CPU).unwrap();
        child.set_slot(CPU, &slot(0, RAM, FRAMES, child_object(&child), SlotFlags::LOG_DIRTY)).unwrap();
        assert_eq!((load(&child, gpa(3)), load(&child, gpa(700))), (1, 0));
        store(&child, gpa(5), 2);
        store(&child, gpa(3), 2);
        store(&child, gpa(701), 2);
        child.write(&host.epoch.pin(CPU), &Hint::new(), Gpa::new(gpa(9)), &[3]).unwrap();
        assert_eq!([3, 5, 9, 700, 701, 4].map(|frame| load(&child, gpa(frame))), [2, 2, 3, 0, 2, 1]);
        for frame in 0..FRAMES {
            let writable = leaf(&child, gpa(frame)).is_some_and(|leaf| leaf.permissions.write);
            assert_eq!(writable, [3, 5, 701].contains(&frame), "{policy:?}, frame {frame}");
        }
        let mut log = [0; FRAMES as usize / 64];
        child.get_dirty_log(CPU, 0, &mut log).unwrap();
        let logged: Vec<_> = (0..FRAMES).filter(|frame| log[*frame as usize / 64] >> (frame % 64) & 1 != 0).collect();
        assert_eq!(logged, [3, 5, 9, 701]);
        assert_eq!(store(&child, gpa(5), 4), 1, "protected again");
        let copy = child_object(&child);
        let pin = host.epoch.pin(CPU);
        let get = |handle| host.objects.get(&pin, handle).unwrap();
        let parts = get(copy).differences(&host.supply(0), get(object), 0).unwrap();
        let differing: Vec<_> = parts.flat_map(|(start, count)| start..start + count).collect();
        match policy {
            Policy::Pages => assert_eq!(differing, logged),
            // Where nothing was, a block is made.
            _ => assert!(logged.iter().all(|frame| differing.contains(frame)) && !differing.contains(&4)),
        }
        drop(pin);
        end(child);
        end(parent);
        assert_eq!(settled(&host), 0);
    }
}

/// Z-G2: what the difference must not miss.
#[test]
fn a_difference_that_misses_a_page_is_noticed() {
    let host = host(8192);
    let (parent, object) = with_memory(&host, Policy::Blocks);
    store(&parent, gpa(5), 1);
    let child = parent.fork(CPU).unwrap();
    store(&child, gpa(5), 2);
    let copy = child_object(&child);
    let differing = || {
        let pin = host.epoch.pin(CPU);
        let get = |handle| host.objects.get(&pin, handle).unwrap();
        get(copy).differences(&host.supply(0), get(object), 0).unwrap().collect::<Vec<_>>()
    };
    assert_eq!(differing(), [(5, 1)]);
    entresol_sync::zoo::plant(&[entresol_sync::zoo::Bug::ZG2]);
    let planted = differing();
    entresol_sync::zoo::plant(&[]);
    assert_eq!(planted, [], "the bug is there, so a test that compares would fail");
}
