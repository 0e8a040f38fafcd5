/// The enum, its list and its names from one table.
macro_rules! points {
    ($($(#[$doc:meta])* $point:ident = $name:literal,)*) => {
        /// A point, named after what has just been done when the server dies there.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point {
            $($(#[$doc])* $point,)*
        }

        #[cfg(feature = "on")]
        impl Point {
            pub const ALL: &[Self] = &[$(Self::$point,)*];

            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                }
            }
        }
    };
}

points! {
    /// Under its temporary name.
    FileWritten = "host.file_written",
    FileReplaced = "host.file_replaced",
    /// Without limits yet.
    CgroupMade = "host.cgroup_made",
    CgroupLimited = "host.cgroup_limited",
    /// Version-1 hierarchies only.
    CgroupConfined = "host.cgroup_confined",
    CgroupKilled = "host.cgroup_killed",
    /// In one of its hierarchies.
    CgroupRemoved = "host.cgroup_removed",
    CgroupPruned = "host.cgroup_pruned",
    /// The parent dies when its child has not executed its program yet.
    ChildBorn = "host.child_born",
    Spawned = "host.spawned",

    /// A volume's record says that it is being made.
    VolumeWritten = "volume.written",
    /// Its file is whole; the record does not know yet.
    VolumeMade = "volume.made",
    /// It is kept from machines, to be copied, grown or checked.
    VolumeHeld = "volume.held",
    VolumeGrown = "volume.grown",
    /// Checked or repaired because somebody asked; the record does not know yet.
    VolumeMended = "volume.mended",
    /// Its record says that it is being removed.
    VolumeDoomed = "volume.doomed",
    /// Its file is gone; the record is not.
    VolumeErased = "volume.erased",
    /// Its file bears no name yet.
    VolumeFormatted = "volume.formatted",
    /// Its file is longer, its file system is not.
    VolumeLengthened = "volume.lengthened",
    VolumeChecked = "volume.checked",
    /// A machine may write to it from here on.
    VolumeGiven = "volume.given",

    JailRootMade = "vmm.root_made",
    JailLinked = "vmm.files_linked",
    JailDiskGiven = "vmm.disk_given",
    JailDiskLinked = "vmm.disk_linked",
    /// An extra disk.
    JailAttached = "volume.linked",
    JailConsoleMade = "vmm.console_made",
    JailComplete = "vmm.jail_complete",
    VmmGrouped = "vmm.grouped",
    VmmConsoleBegun = "vmm.console_begun",
    VmmForked = "vmm.forked",
    VmmIdentified = "vmm.identified",
    /// Firecracker: its root is open to it.
    FirecrackerOpened = "firecracker.opened",
    /// Firecracker: told one thing.
    FirecrackerTold = "firecracker.told",
    FirecrackerClosed = "firecracker.closed",
    FirecrackerStarted = "firecracker.started",
    VmmDrained = "vmm.drained",
    /// QEMU: the machine's socket.
    VmmServed = "vmm.served",
    VmmKilled = "vmm.killed",
    VmmFinished = "vmm.finished",
    JailManifestGone = "vmm.manifest_gone",
    JailGone = "vmm.jail_gone",
    VmmGroupGone = "vmm.group_gone",
    LogsGone = "vmm.logs_gone",

    NetNamed = "net.named",
    NetMounted = "net.mounted",
    NetTaps = "net.taps_made",
    NetVeth = "net.veth_made",
    NetConfigured = "net.configured",
    NetRules = "net.rules_loaded",
    NetMarkedReady = "net.marked_ready",
    NetMarkedGiven = "net.marked_given",
    NetAdmitted = "net.admitted",
    NetMarkedUsed = "net.marked_used",
    NetSilenced = "net.silenced",
    NetForgotten = "net.forgotten",
    NetUnnamed = "net.unnamed",
    NetLinkGone = "net.link_gone",

    /// Under its temporary name.
    TemplateFormatted = "image.template_formatted",
    /// Under its temporary name.
    DiskCloned = "image.disk_cloned",
    SpareTaken = "image.spare_taken",
    DiskNamed = "image.disk_named",
    DiskRemoved = "image.disk_removed",

    /// An archive, in files of its own.
    ArchiveReceived = "library.received",
    /// Its layers are the store's; no image has them yet.
    LayersKept = "library.kept",
    /// One layer; the helper waits for the next.
    LayerUnpacked = "library.unpacked",
    /// A file system that is nobody's yet.
    ImageBuilt = "library.built",
    /// It lies under its digest; no manifest names it.
    ImageAdopted = "library.adopted",
    /// Its manifest bears no name.
    ImageDescribed = "library.described",
    ImageNamed = "library.named",

    /// The flake's sources are in the build's directory.
    BuildReceived = "build.received",
    /// Its disks are made; there is no VM yet.
    BuildLaidOut = "build.laid_out",
    /// Its VM is accepted.
    BuildAccepted = "build.accepted",

    /// In a transaction that is not committed.
    StoreWritten = "store.written",
    /// Nobody has been told.
    StoreCommitted = "store.committed",

    /// A machine's share was promised to a VM; nothing of it is written down.
    Admitted = "control.admitted",
    Accepted = "control.accepted",
    Intended = "control.intended",
    StepDone = "control.step_done",
    GuestSaidHello = "control.guest_said_hello",
    GuestAsked = "control.guest_asked",
    /// Any other than the four below.
    PhaseWritten = "control.phase_written",
    /// Its machine ended, and its policy has it started again.
    RestartPlanned = "control.restart_planned",
    /// The pause before a start by policy is over.
    RestartBegun = "control.restart_begun",
    Quarantined = "control.quarantined",
    /// Out of quarantine.
    Released = "control.released",
    /// Its time to live is over; nothing was done about it yet.
    Expired = "control.expired",
    Forgotten = "control.forgotten",
}
