//! System tests: real machines that boot, and a reader that expects.
//!
//! A test is a function with a name in [`TESTS`]. It builds a [`machine::Machine`], waits for what its console must say,
//! types, asks over the control channel, and waits for the machine's end. Two machines run at a time. A test has no time
//! limit of its own: a machine that makes progress is waited for ([`transcript`]).
//!
//! A failure prints what was expected, the end of the console's log, where the whole log is, and the command that runs
//! this test alone.

mod balloon;
mod boot;
mod boot_loaders;
mod control;
mod dirty;
mod firmware;
mod fork;
mod kernels;
mod linux;
pub mod machine;
mod merge;
mod mmio;
mod mte;
mod nbd;
pub mod owner;
mod page;
mod poison;
mod posted;
mod private;
mod programs;
mod slots;
mod snapshot;
mod stale;
mod stolen;
mod store;
mod swap;
mod swap_device;
mod swap_history;
mod swap_removal;
pub mod transcript;
mod x86;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Result, anyhow, ensure};
use entresol_wire::config::Arch;

use crate::fetch::{self, Bochs, Guest, Qemu};
use crate::image::{self, Image};
use crate::workspace;

/// Machines at one time: CI has two CPUs, and each machine uses up to two.
const AT_ONCE: usize = 2;

/// One named test.
pub struct SystemTest {
    pub name: &'static str,
    pub about: &'static str,
    pub run: fn(&Context) -> Result<()>,
}

/// Every system test, longest first so that the last one does not run alone.
pub const TESTS: &[SystemTest] = &[
    SystemTest {
        name: "linux_works_its_memory_and_disk",
        about: "4 vCPUs on 2 CPUs write 400 MiB and a disk and read them back; entries are what was touched",
        run: linux::linux_works_its_memory_and_disk,
    },
    SystemTest {
        name: "x86_linux_works_its_memory_and_disk",
        about: "the same under SVM",
        run: linux::x86_linux_works_its_memory_and_disk,
    },
    SystemTest {
        name: "live_forks_answer_diverge_and_end",
        about: "a working guest is forked ten times: all answer, diverge, and give every frame back in any order",
        run: fork::live_forks_answer_diverge_and_end,
    },
    SystemTest {
        name: "x86_live_forks_answer_diverge_and_end",
        about: "the same under SVM",
        run: fork::x86_live_forks_answer_diverge_and_end,
    },
    SystemTest {
        name: "balloon_gives_memory_back",
        about: "a guest's free pages come back by reports and by its balloon, and go again; a copy has its own; frames exact",
        run: balloon::balloon_gives_memory_back,
    },
    SystemTest {
        name: "snapshots_outlive_the_machine",
        about: "a working guest is saved, the machine killed while a file is written again; the next machine restores the old",
        run: snapshot::snapshots_outlive_the_machine,
    },
    SystemTest {
        name: "x86_snapshots_outlive_the_machine",
        about: "the same under SVM",
        run: snapshot::x86_snapshots_outlive_the_machine,
    },
    SystemTest {
        name: "a_full_store_harms_nobody",
        about: "a snapshot that has no room: a reason, the guest goes on, the store is as it was",
        run: snapshot::a_full_store_harms_nobody,
    },
    SystemTest {
        name: "x86_a_full_store_harms_nobody",
        about: "the same under SVM",
        run: snapshot::x86_a_full_store_harms_nobody,
    },
    SystemTest {
        name: "equal_guests_give_memory_back",
        about: "two guests with 400 MiB alike: merging gives most of one back, writes are private, data stays right",
        run: merge::equal_guests_give_memory_back,
    },
    SystemTest {
        name: "x86_equal_guests_give_memory_back",
        about: "the same under SVM",
        run: merge::x86_equal_guests_give_memory_back,
    },
    SystemTest {
        name: "changed_memory_is_never_stale",
        about: "every byte through every mapping after forks and copies on write",
        run: fork::changed_memory_is_never_stale,
    },
    SystemTest {
        name: "private_memory_is_nowhere_else",
        about: "private Linux under load, 1,000 audits; a stray read faults and harms nobody; a killed VM leaves zeroes",
        run: private::private_memory_is_nowhere_else,
    },
    SystemTest {
        name: "x86_private_memory_is_nowhere_else",
        about: "the same under SVM",
        run: private::x86_private_memory_is_nowhere_else,
    },
    SystemTest {
        name: "private_memory_bounces",
        about: "private Linux whose devices reach a window of its memory only: the disk works, nothing else is mapped",
        run: private::private_memory_bounces,
    },
    SystemTest {
        name: "stolen_time_meets_conversions",
        about: "eight vCPUs' records in one private page that is shared, taken back and given back: no time is stale",
        run: private::stolen_time_meets_conversions,
    },
    SystemTest {
        name: "swap_takes_and_brings_back",
        about: "a guest's memory goes to the swap device and comes back, through an error of the disk and a fork; frames exact",
        run: swap::swap_takes_and_brings_back,
    },
    SystemTest {
        name: "x86_swap_takes_and_brings_back",
        about: "the same under SVM",
        run: swap::x86_swap_takes_and_brings_back,
    },
    SystemTest {
        name: "replaced_memory_is_never_stale",
        about: "every byte through every mapping after merges, forks and slots that move; each write after is one trap",
        run: stale::replaced_memory_is_never_stale,
    },
    SystemTest {
        name: "tagged_heap_finds_what_was_freed",
        about: "Linux with mte = true: /proc/cpuinfo says so, a use after free ends by a tag fault; without it neither",
        run: mte::tagged_heap_finds_what_was_freed,
    },
    SystemTest {
        name: "swap_device_fails_and_comes_back",
        about: "reads fail, writes fail or are cut off, the disk is silent or gone: nothing is lost, others run, who needs it goes on after",
        run: swap_device::swap_device_fails_and_comes_back,
    },
    SystemTest {
        name: "swap_device_is_removed_and_used_again",
        about: "the swap device is taken out of use: all that is on it comes back, for all who share it, or the device stays",
        run: swap_removal::swap_device_is_removed_and_used_again,
    },
    SystemTest {
        name: "tagged_memory_survives_any_history",
        about: "guests with tags under random histories of reclaim, fork, merge, pause and removal of the swap device: nothing is lost",
        run: swap_history::tagged_memory_survives_any_history,
    },
    SystemTest {
        name: "tags_come_back_from_the_disk",
        about: "guests with tags leave for the swap device and come back, read only, written, forked and merged: no tag is lost",
        run: swap::tags_come_back_from_the_disk,
    },
    SystemTest {
        name: "tags_outlive_the_machine",
        about: "tags are read and written from outside, saved, saved as a difference, and restored",
        run: mte::tags_outlive_the_machine,
    },
    SystemTest {
        name: "limits_say_whose_memory_leaves",
        about: "a guest of 96 MiB has 32 MiB in memory and finishes; memory.low and a higher priority are spared",
        run: swap::limits_say_whose_memory_leaves,
    },
    SystemTest {
        name: "guests_share_less_than_they_use",
        about: "three guests of 512 MiB work on 400 MiB each with 800 MiB for all: memory is reclaimed unasked, nothing is lost",
        run: swap::guests_share_less_than_they_use,
    },
    SystemTest {
        name: "x86_guests_share_less_than_they_use",
        about: "the same under SVM",
        run: swap::x86_guests_share_less_than_they_use,
    },
    SystemTest {
        name: "poisoned_page_aborts_and_rest_goes_on",
        about: "frames of a guest, its copy and a private guest are found to be bad: aborts, new pages, no frame comes back",
        run: poison::poisoned_page_aborts_and_rest_goes_on,
    },
    SystemTest {
        name: "hostile_guests_harm_nobody",
        about: "three guests attack with a seed each; the fourth answers all the time, and outlives them",
        run: programs::hostile_guests_harm_nobody,
    },
    SystemTest {
        name: "out_of_memory_pauses_who_asked",
        about: "a VM that takes all memory waits, the others run; with a killed one's memory it goes on",
        run: programs::out_of_memory_pauses_who_asked,
    },
    SystemTest {
        name: "slots_change_under_eight_vcpus",
        about: "random slot updates under accesses of every kind: right data, no memory is emulated",
        run: slots::slots_change_under_eight_vcpus,
    },
    SystemTest {
        name: "every_touch_is_one_entry",
        about: "entries are the pages and the blocks touched, to the number",
        run: programs::every_touch_is_one_entry,
    },
    SystemTest {
        name: "memory_is_right_through_every_mapping",
        about: "MMU off and on, every memory type, set/way, changing code: blocks and pages",
        run: programs::memory_is_right_through_every_mapping,
    },
    SystemTest {
        name: "caches_without_forced_write_back_are_cleaned",
        about: "on a CPU without FEAT_S2FWB: set/way cleans once for each time that caches go on or off",
        run: programs::caches_without_forced_write_back_are_cleaned,
    },
    SystemTest {
        name: "cpus_interrupts_and_timers_are_right",
        about: "PSCI, the interrupt controller and the timers, from inside, 4 vCPUs on 2 CPUs",
        run: programs::cpus_interrupts_and_timers_are_right,
    },
    SystemTest {
        name: "nothing_outside_the_slots_is_reached",
        about: "fetches abort, loads and stores follow both policies, and are counted",
        run: programs::nothing_outside_the_slots_is_reached,
    },
    SystemTest {
        name: "linux_uses_every_cpu_and_device",
        about: "8 vCPUs on 2 CPUs work, go off and on; clock, entropy, virtio console; a reboot starts over",
        run: linux::linux_uses_every_cpu_and_device,
    },
    SystemTest {
        name: "nothing_is_mapped_before_the_first_touch",
        about: "a VM that waits has no entry; with 4 KiB pages it gets one for each page it touches",
        run: linux::nothing_is_mapped_before_the_first_touch,
    },
    SystemTest {
        name: "linux_lives_on_its_virtio_console",
        about: "a guest whose only console is its virtio port, in both directions",
        run: linux::linux_lives_on_its_virtio_console,
    },
    SystemTest {
        name: "files_outlive_the_machine",
        about: "a store made on the host is listed and changed by the hypervisor, and read on the host after it",
        run: store::files_outlive_the_machine,
    },
    SystemTest {
        name: "two_guests_run_side_by_side",
        about: "two Linux guests with a disk each; both run their scripts and power off",
        run: boot::two_guests_run_side_by_side,
    },
    SystemTest {
        name: "x86_two_guests_run_side_by_side",
        about: "the same under SVM",
        run: boot::x86_two_guests_run_side_by_side,
    },
    SystemTest {
        name: "owner_pauses_resumes_and_kills",
        about: "over the control channel: a console, a paused guest that does nothing, a killed one whose memory is back",
        run: control::owner_pauses_resumes_and_kills,
    },
    SystemTest {
        name: "client_that_does_not_read_stops_nobody",
        about: "output that it does not take is counted, requests wait, and the next client is served",
        run: control::client_that_does_not_read_stops_nobody,
    },
    SystemTest {
        name: "edk2_that_cannot_carry_it_is_refused",
        about: "EDK2 below EL2 or without a device tree gets a reason and goes on",
        run: boot_loaders::edk2_that_cannot_carry_it_is_refused,
    },
    SystemTest {
        name: "edk2_starts_the_hypervisor",
        about: "EDK2 starts the image as an EFI application; a Linux guest runs on it",
        run: boot_loaders::edk2_starts_the_hypervisor,
    },
    SystemTest {
        name: "u_boot_starts_the_hypervisor",
        about: "U-Boot's booti starts the image at another address; a Linux guest runs on it",
        run: boot_loaders::u_boot_starts_the_hypervisor,
    },
    SystemTest {
        name: "edk2_as_guest_keeps_variables_and_boots_linux",
        about: "EDK2 runs from ROM, keeps a variable in its flash over a reset, and boots Linux from a disk",
        run: firmware::edk2_as_guest_keeps_variables_and_boots_linux,
    },
    SystemTest {
        name: "firmware_shares_rom_and_keeps_its_flash",
        about: "two U-Boots on one copy of their code and of a file, each with settings of its own in flash",
        run: firmware::firmware_shares_rom_and_keeps_its_flash,
    },
    SystemTest {
        name: "gzipped_kernel_boots",
        about: "a gzip'd Image boots to the shell",
        run: kernels::gzipped_kernel_boots,
    },
    SystemTest {
        name: "u_boot_as_guest_boots_linux",
        about: "U-Boot, flat and ELF, reaches its prompt, and boots Linux from a virtio disk",
        run: kernels::u_boot_as_guest_boots_linux,
    },
    SystemTest {
        name: "damaged_bundles_start_nothing",
        about: "a bundle that is cut off or altered is refused by name",
        run: kernels::damaged_bundles_start_nothing,
    },
    SystemTest {
        name: "memory_of_another_machine_starts_nothing",
        about: "a VM that was checked against a larger machine is refused",
        run: kernels::memory_of_another_machine_starts_nothing,
    },
    SystemTest {
        name: "bad_input_is_named",
        about: "every mistake of an owner is refused with its field, value and rule",
        run: kernels::bad_input_is_named,
    },
    SystemTest {
        name: "lab_page_shows_the_stale_line",
        about: "the page of Z-A1 in a headless browser: lanes, the dirty line, memory behind it, the step that read it",
        run: page::lab_page_shows_the_stale_line,
    },
    SystemTest {
        name: "stolen_time_is_told",
        about: "two guests on one CPU: each vCPU learns how long the other had it, and a copy goes on counting",
        run: stolen::stolen_time_is_told,
    },
    SystemTest {
        name: "linux_boots_to_shell",
        about: "Debian's kernel boots on the hypervisor to a shell that answers, and powers off",
        run: boot::linux_boots_to_shell,
    },
    SystemTest {
        name: "bare_linux_boots_to_shell",
        about: "the same kernel and initial file system without the hypervisor: the fetched files are good",
        run: boot::bare_linux_boots_to_shell,
    },
    SystemTest {
        name: "x86_guest_works_its_memory",
        about: "x86-64: a first guest under SVM and nested paging: memory, ports, CPUID, registers, dirty log, power-off",
        run: x86::x86_guest_works_its_memory,
    },
    SystemTest {
        name: "vmx_guest_works_its_memory",
        about: "x86-64 under Bochs, from a disk by GRUB: the first guest under VMX and EPT",
        run: x86::vmx_guest_works_its_memory,
    },
    SystemTest {
        name: "vmx_linux_runs_a_script",
        about: "x86-64 under Bochs: Debian's amd64 kernel boots under VMX and EPT to user space, and powers off",
        run: x86::vmx_linux_runs_a_script,
    },
    SystemTest {
        name: "x86_starts_from_a_disk",
        about: "x86-64: GRUB starts the hypervisor from a PC's disk by multiboot2, and a guest runs",
        run: x86::x86_starts_from_a_disk,
    },
    SystemTest {
        name: "x86_linux_runs_a_script",
        about: "x86-64: Debian's amd64 kernel boots under SVM and nested paging to user space, and powers off",
        run: x86::x86_linux_runs_a_script,
    },
    SystemTest {
        name: "x86_guest_on_shadow_tables",
        about: "x86-64: the first guest under SVM without nested paging",
        run: x86::x86_guest_on_shadow_tables,
    },
    SystemTest {
        name: "x86_linux_on_shadow_tables",
        about: "x86-64: Debian's amd64 kernel boots on two vCPUs under SVM without nested paging, works on memory of both, and powers off",
        run: x86::x86_linux_on_shadow_tables,
    },
    SystemTest {
        name: "x86_mmio_entries",
        about: "x86-64: accesses to what is no memory by cache, by walk and the whole way, counted; without a bit to reserve too",
        run: x86::x86_mmio_entries,
    },
    SystemTest {
        name: "x86_refuses_by_name",
        about: "x86-64: no SVM, no bundle, and what a configuration asks for that is not there, each with its reason",
        run: x86::x86_refuses_by_name,
    },
    SystemTest {
        name: "mmio_of_every_kind",
        about: "pairs, writeback, SIMD, byte order, page boundaries, aborts on devices: decoded and emulated",
        run: mmio::mmio_of_every_kind,
    },
    SystemTest {
        name: "log_rings_and_mark_name_what_was_written",
        about: "random stores of 2 vCPUs: log, rings and mark name the same pages, those that the guest says",
        run: dirty::log_rings_and_mark_name_what_was_written,
    },
    SystemTest {
        name: "private_writes_are_named_too",
        about: "the same of a machine whose memory is private",
        run: dirty::private_writes_are_named_too,
    },
    SystemTest {
        name: "x86_log_rings_and_mark_name_what_was_written",
        about: "x86-64: random stores of one vCPU: log, rings and mark name the same pages, those that the guest says",
        run: dirty::x86_log_rings_and_mark_name_what_was_written,
    },
    SystemTest {
        name: "x86_private_writes_are_named_too",
        about: "the same of a machine whose memory is private",
        run: dirty::x86_private_writes_are_named_too,
    },
    SystemTest {
        name: "rings_lie_where_they_should_not",
        about: "rings across pages, in nothing, devices, ROM, private and changing pages: a reset is asked for, and nothing is left",
        run: private::rings_lie_where_they_should_not,
    },
    SystemTest {
        name: "private_machines_fork_and_are_saved",
        about: "private Linux forks, is saved and restored: data stays right and apart, no frame is where it should not be",
        run: private::private_machines_fork_and_are_saved,
    },
    SystemTest {
        name: "trapped_cache_maintenance",
        about: "cache maintenance by address traps: nothing is lost, and its faults are the guest's own",
        run: mmio::trapped_cache_maintenance,
    },
    SystemTest {
        name: "bare_mmio_of_every_kind",
        about: "the same guest without the hypervisor: what it expects is what the architecture says",
        run: mmio::bare_mmio_of_every_kind,
    },
    SystemTest {
        name: "maintenance_follows_the_table",
        about: "each cache maintenance operation on each kind of target, by both policies",
        run: slots::maintenance_follows_the_table,
    },
    SystemTest {
        name: "owner_changes_slots",
        about: "a running guest sees its memory a second time, read-only, and then not any more; bad slots are refused",
        run: slots::owner_changes_slots,
    },
    SystemTest {
        name: "only_what_is_free_is_passed_through",
        about: "memory, the serial port and the control channel's page are refused as a guest's own device",
        run: slots::only_what_is_free_is_passed_through,
    },
    SystemTest {
        name: "posted_stores_reach_the_owner",
        about: "coalesced writes arrive once and in order, a full ring stops the VM, doorbells are told",
        run: posted::posted_stores_reach_the_owner,
    },
    SystemTest {
        name: "owner_stops_on_what_is_not_emulated",
        about: "no_syndrome = stop: a load-exclusive on a device crashes the VM, and the reason names it",
        run: mmio::owner_stops_on_what_is_not_emulated,
    },
    SystemTest {
        name: "bare_linux_runs_a_script",
        about: "a scripted initial file system loads its drivers, reports the script's status and powers off",
        run: boot::bare_linux_runs_a_script,
    },
];

/// What tests share: made once, read by all.
pub struct Context {
    pub qemu: Qemu,
    pub guest: Guest,
    /// Logs, images and bundles of tests, each in a folder of the test's name.
    pub work: PathBuf,
    hypervisor: OnceLock<Result<Image, String>>,
    x86: OnceLock<Result<X86, String>>,
    guest_x86: OnceLock<Result<Guest, String>>,
    bochs: OnceLock<Result<Bochs, String>>,
}

/// What tests of x86-64 need besides.
pub struct X86 {
    pub qemu: Qemu,
    pub hypervisor: PathBuf,
}

impl Context {
    /// The hypervisor, built when the first test asks for it.
    ///
    /// # Errors
    /// When it does not build: the same error for every test.
    pub fn hypervisor(&self) -> Result<&Image> {
        let built = self.hypervisor.get_or_init(|| image::build(&[]).map_err(|error| format!("{error:#}")));
        built.as_ref().map_err(|error| anyhow!("{error}"))
    }

    /// What guests of `arch` start with; x86-64's when the first test asks for it.
    ///
    /// # Errors
    /// When it cannot be had: the same error for every test.
    pub fn guest(&self, arch: Arch) -> Result<&Guest> {
        if arch == Arch::Arm64 {
            return Ok(&self.guest);
        }
        let made = self.guest_x86.get_or_init(|| fetch::guest_x86().map_err(|error| format!("{error:#}")));
        made.as_ref().map_err(|error| anyhow!("{error}"))
    }

    /// QEMU and the hypervisor of x86-64, when the first test asks for them.
    ///
    /// # Errors
    /// When one cannot be had: the same error for every test.
    pub fn x86(&self) -> Result<&X86> {
        let made = || Ok(X86 { qemu: fetch::qemu_x86()?, hypervisor: image::build_x86()? });
        let made = self.x86.get_or_init(|| made().map_err(|error: anyhow::Error| format!("{error:#}")));
        made.as_ref().map_err(|error| anyhow!("{error}"))
    }

    /// Bochs, when the first test asks for it.
    ///
    /// # Errors
    /// When it cannot be had: the same error for every test.
    pub fn bochs(&self) -> Result<&Bochs> {
        let made = self.bochs.get_or_init(|| fetch::bochs().map_err(|error| format!("{error:#}")));
        made.as_ref().map_err(|error| anyhow!("{error}"))
    }
}

/// Runs the tests whose names contain one of `wanted`, or all; returns how many passed and failed.
///
/// # Errors
/// When QEMU or the guest's files cannot be had, or no test has such a name.
pub fn run(wanted: &[String]) -> Result<(usize, usize)> {
    let chosen = |test: &&SystemTest| wanted.is_empty() || wanted.iter().any(|part| test.name.contains(part.as_str()));
    let queue: VecDeque<&SystemTest> = TESTS.iter().filter(chosen).collect();
    ensure!(!queue.is_empty(), "no system test is named {}; see cargo xtask test --list", wanted.join(" or "));
    let (qemu, guest) = fetch::everything()?;
    let work = workspace::output_dir()?.join("system");
    let context = Context {
        qemu,
        guest,
        work,
        hypervisor: OnceLock::new(),
        x86: OnceLock::new(),
        guest_x86: OnceLock::new(),
        bochs: OnceLock::new(),
    };
    let (queue, tally) = (Mutex::new(queue), Mutex::new((0, 0)));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(test) = lock(&queue).pop_front() {
                    let passed = run_one(test, &context);
                    let mut tally = lock(&tally);
                    *if passed { &mut tally.0 } else { &mut tally.1 } += 1;
                }
            });
        }
    });
    Ok(*lock(&tally))
}

fn run_one(test: &SystemTest, context: &Context) -> bool {
    let started = Instant::now();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (test.run)(context)));
    let result = result.unwrap_or_else(|_| Err(anyhow!("the test itself panicked")));
    let seconds = started.elapsed().as_secs_f32();
    match &result {
        Ok(()) => println!("system test {} ... ok ({seconds:.1} s)", test.name),
        Err(error) => {
            println!("system test {} ... FAILED ({seconds:.1} s)\n{error:#}", test.name);
            println!("    to run it alone: cargo xtask test --system {}", test.name);
        }
    }
    result.is_ok()
}

/// What a mutex holds stays good when a test panics: nothing is changed halfway under these locks.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
