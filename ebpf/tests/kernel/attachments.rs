//! Who hangs where, and what survives whom. The independent eyes are `tc filter show` for clsact and the kernel's own list for tcx
//! (iproute2 does not show tcx, and bpftool only since 6.6).

use std::fs;

use aya::programs::SchedClassifier;
use aya::programs::links::LinkOrder;
use aya::programs::tc::{TcAttachOptions, TcAttachType};
use shroud_ebpf::{Attach, Attachment, Build, Change, Desired, Gate, Hook, Mechanism, Mode, diff};

use crate::namespace::{Namespace, PinDirectory, eventually, reconcile, run};
use crate::tables::table;
use crate::{every_means, has_tcx, needs_tcx};

#[test]
fn it_hangs_where_it_should_and_a_second_pass_changes_nothing() {
    for attach in every_means() {
        let world = World::new();
        let mut gate = world.open(attach);

        let first = reconcile(&mut gate, &desired());
        let second = reconcile(&mut gate, &desired());

        let by = if attach == Attach::Tcx { "tcx" } else { "clsact" };
        assert_eq!(
            first,
            [
                "gate table: none -> enforce, 2 protected, 8 owned, 1 exempt, 2 opted out".to_owned(),
                format!("gate on eth0 egress ({by}): none -> attached"),
                format!("gate on eth0 ingress ({by}): none -> attached"),
                format!("gate on pod0 pod ({by}): none -> attached"),
            ]
        );
        assert_eq!(second, Vec::<String>::new());
        assert_eq!(
            world.hanging(),
            [
                format!("eth0 {by}/egress shroud_egress"),
                format!("eth0 {by}/ingress shroud_ingress"),
                format!("pod0 {by}/ingress shroud_pod")
            ]
        );
    }
}

#[test]
fn it_outlives_the_process_and_the_next_one_finds_it() {
    for attach in every_means() {
        let world = World::new();
        reconcile(&mut world.open(attach), &desired());
        let before = world.program_ids();

        let mut gate = world.open(attach);

        assert_eq!(world.program_ids(), before, "the programs are the same ones");
        assert_eq!(reconcile(&mut gate, &desired()), Vec::<String>::new());
    }
}

/// An upgrade: the pins name another build, so the new program takes the place of the old one.
#[test]
fn another_build_is_replaced_in_place_and_keeps_its_tables_and_counters() {
    for attach in every_means() {
        let world = World::new();
        reconcile(&mut world.open(attach), &desired());
        let before = world.program_ids();
        let programs = world.pins.0.join("v3/programs");
        let build = fs::read_dir(&programs).unwrap().next().unwrap().unwrap().path();
        fs::rename(&build, programs.join("0123456789abcdef")).unwrap();

        let mut gate = world.open(attach);
        let changes = diff(&desired(), &gate.observe().unwrap());

        let replaced = |change: &Change| {
            matches!(
                change,
                Change::Attach {
                    old: Some(Build::Other),
                    ..
                }
            )
        };
        assert!(changes.len() == 3 && changes.iter().all(replaced), "{changes:?}");
        for change in &changes {
            assert_eq!(world.hanging().len(), 3, "never without a gate");
            gate.apply(change).unwrap();
        }
        assert_eq!(world.hanging().len(), 3);
        assert!(
            world.program_ids().iter().all(|id| !before.contains(id)),
            "new programs"
        );
        assert_eq!(reconcile(&mut gate, &desired()), Vec::<String>::new());
        assert!(!programs.join("0123456789abcdef").exists());
    }
}

#[test]
fn a_device_that_was_made_again_gets_its_gate_again() {
    for attach in every_means() {
        let world = World::new();
        let mut gate = world.open(attach);
        reconcile(&mut gate, &desired());

        run(&["ip", "link", "del", "eth0"]);
        run(&["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far0"]);

        let pins = world.link_pins();
        let changes = reconcile(&mut gate, &desired());
        assert_eq!(world.hanging().len(), 3);
        assert_eq!(reconcile(&mut gate, &desired()), Vec::<String>::new());
        // Nothing is left of the old device.
        assert_eq!(world.link_pins().len(), pins.len(), "{changes:?}");
        assert_eq!(changes.len(), 2 + usize::from(!pins.is_empty()), "{changes:?}");
    }
}

#[test]
fn what_somebody_detached_is_attached_again() {
    let world = World::new();
    let mut gate = world.open(Attach::Clsact);
    reconcile(&mut gate, &desired());
    run(&["tc", "filter", "del", "dev", "eth0", "egress"]);
    assert_eq!(
        reconcile(&mut gate, &desired()),
        ["gate on eth0 egress (clsact): none -> attached"]
    );
}

/// Who lives holds the links open: whoever removes their pins detaches nothing.
#[test]
fn a_pin_that_somebody_removes_detaches_nothing() {
    if !needs_tcx("a_pin_that_somebody_removes_detaches_nothing") {
        return;
    }
    let world = World::new();
    let mut gate = world.open(Attach::Tcx);
    reconcile(&mut gate, &desired());
    let hanging = world.hanging();
    for link in fs::read_dir(world.pins.0.join("v3/links")).unwrap() {
        fs::remove_file(link.unwrap().path()).unwrap();
    }

    let changes = reconcile(&mut gate, &desired());

    assert_eq!(changes.len(), 1, "{changes:?}");
    assert!(changes[0].starts_with("pins link "), "{changes:?}");
    assert_eq!(reconcile(&mut gate, &desired()), Vec::<String>::new());
    assert_eq!(world.hanging(), hanging);
    drop(gate);
    assert_eq!(
        reconcile(&mut world.open(Attach::Tcx), &desired()),
        Vec::<String>::new()
    );
}

/// A pinned link keeps its file when somebody detaches it by hand; the file then holds nothing.
#[test]
fn a_link_that_was_detached_by_force_is_seen_as_missing() {
    if !needs_tcx("a_link_that_was_detached_by_force_is_seen_as_missing") {
        return;
    }
    let world = World::new();
    let mut gate = world.open(Attach::Tcx);
    reconcile(&mut gate, &desired());
    let links = fs::read_dir(world.pins.0.join("v3/links"))
        .unwrap()
        .map(|link| link.unwrap().path());
    let egress = links
        .into_iter()
        .find(|link| link.to_str().unwrap().ends_with("-egress"))
        .unwrap();

    run(&["bpftool", "link", "detach", "pinned", egress.to_str().unwrap()]);

    assert_eq!(
        reconcile(&mut gate, &desired()),
        ["gate on eth0 egress (tcx): none -> attached"]
    );
    assert_eq!(world.hanging().len(), 3);
}

#[test]
fn lost_pins_come_back() {
    for attach in every_means() {
        let world = World::new();
        let mut gate = world.open(attach);
        reconcile(&mut gate, &desired());
        fs::remove_dir_all(&world.pins.0).unwrap();

        let changes = reconcile(&mut gate, &desired());

        assert!(changes[0].starts_with("pins ACTIVE, COUNTERS, "), "{changes:?}");
        assert_eq!(reconcile(&mut gate, &desired()), Vec::<String>::new());
        let ids = world.program_ids();
        drop(gate);
        assert_eq!(reconcile(&mut world.open(attach), &desired()), Vec::<String>::new());
        assert_eq!(world.program_ids(), ids);
    }
}

/// Pins lost while nobody was there: the filter is known by its handle and name, and the new table is filled before it is switched to.
#[test]
fn lost_pins_without_a_process_are_an_upgrade() {
    let world = World::new();
    reconcile(&mut world.open(Attach::Clsact), &desired());
    fs::remove_dir_all(&world.pins.0).unwrap();

    let mut gate = world.open(Attach::Clsact);
    let changes = reconcile(&mut gate, &desired());

    assert_eq!(
        changes[0],
        "gate table: none -> enforce, 2 protected, 8 owned, 1 exempt, 2 opted out"
    );
    assert_eq!(changes[1], "gate on eth0 egress (clsact): another build -> this build");
    assert_eq!(world.hanging().len(), 3);
}

#[test]
fn a_table_that_somebody_changed_is_replaced() {
    let world = World::new();
    let mut gate = world.open(Attach::Auto);
    reconcile(&mut gate, &desired());
    let settings = world.pins.0.join("v3/maps/SETTINGS");

    // The generation in force is number 1: the first table went there.
    let mut value = vec![
        "bpftool",
        "map",
        "update",
        "pinned",
        settings.to_str().unwrap(),
        "key",
        "1",
        "0",
        "0",
        "0",
        "value",
    ];
    value.extend(["0"; 116]);
    run(&value);

    assert_eq!(gate.observe().unwrap().table, None);
    reconcile(&mut gate, &desired());
    assert_eq!(gate.observe().unwrap().table, Some(desired().table));
}

#[test]
fn a_change_of_means_attaches_before_it_detaches() {
    if !needs_tcx("a_change_of_means_attaches_before_it_detaches") {
        return;
    }
    for (before, after) in [(Attach::Tcx, Attach::Clsact), (Attach::Clsact, Attach::Tcx)] {
        let world = World::new();
        reconcile(&mut world.open(before), &desired());

        let mut gate = world.open(after);
        let changes = reconcile(&mut gate, &desired());

        let kinds: Vec<bool> = changes
            .iter()
            .map(|change| change.ends_with("none -> attached"))
            .collect();
        assert_eq!(kinds, [true, true, true, false, false, false], "{changes:?}");
        assert_eq!(world.hanging().len(), 3);
        assert_eq!(reconcile(&mut gate, &desired()), Vec::<String>::new());
    }
}

#[test]
fn a_device_that_is_no_uplink_any_more_is_let_go() {
    for attach in every_means() {
        let world = World::new();
        let mut gate = world.open(attach);
        reconcile(&mut gate, &desired());

        reconcile(
            &mut gate,
            &Desired {
                uplinks: [].into(),
                ..desired()
            },
        );

        assert_eq!(world.hanging().len(), 1);
    }
}

/// Another version left its own maps, programs and links: they go once this version hangs at every place.
#[test]
fn another_layout_is_let_go_after_this_one_hangs() {
    for attach in every_means() {
        let world = World::new();
        reconcile(&mut world.open(attach), &desired());
        let before = world.program_ids();
        fs::rename(world.pins.0.join("v3"), world.pins.0.join("v1")).unwrap();
        fs::create_dir(world.pins.0.join("notes")).unwrap();

        let mut gate = world.open(attach);
        let first = reconcile(&mut gate, &desired());
        assert!(world.pins.0.join("v1").exists(), "{first:?}");
        let second = reconcile(&mut gate, &desired());

        assert_eq!(second, ["gate layout v1: beside this one -> none"]);
        let now = eventually("only this layout's programs", || match world.program_ids() {
            ids if ids.len() == 3 => Ok(ids),
            other => Err(format!("{other:?}")),
        });
        assert!(now.iter().all(|id| !before.contains(id)), "{now:?}");
        assert!(!world.pins.0.join("v1").exists());
        assert!(world.pins.0.join("notes").exists());
        assert_eq!(reconcile(&mut gate, &desired()), Vec::<String>::new());
    }
}

#[test]
fn the_encryption_device_has_a_gate_while_it_is_named() {
    for attach in every_means() {
        let world = World::new();
        let by = if attach == Attach::Tcx { "tcx" } else { "clsact" };
        run(&["ip", "tuntap", "add", "shroud0", "mode", "tun"]);
        let with = Desired {
            encryption: ["shroud0".to_owned()].into(),
            ..desired()
        };
        let mut gate = world.open(attach);

        let changes = reconcile(&mut gate, &with);

        assert!(
            changes.contains(&format!("gate on shroud0 decrypted ({by}): none -> attached")),
            "{changes:?}"
        );
        assert_eq!(reconcile(&mut gate, &with), Vec::<String>::new());
        assert_eq!(
            world.hanging_on(&["shroud0"]),
            [format!("shroud0 {by}/ingress shroud_l3_decr")]
        );
        drop(gate);
        let mut gate = world.open(attach);
        assert_eq!(
            reconcile(&mut gate, &with),
            Vec::<String>::new(),
            "it outlives the process"
        );

        // Made again under the same name: the new device has none.
        run(&["ip", "link", "del", "shroud0"]);
        run(&["ip", "tuntap", "add", "shroud0", "mode", "tun"]);
        // The old one's pin, if it has one, goes as well.
        assert_eq!(
            reconcile(&mut gate, &with)[0],
            format!("gate on shroud0 decrypted ({by}): none -> attached")
        );

        assert_eq!(
            reconcile(&mut gate, &desired()),
            [format!("gate on shroud0 decrypted ({by}): attached -> none")]
        );
        assert_eq!(world.hanging_on(&["shroud0"]), Vec::<String>::new());

        reconcile(&mut gate, &with);
        drop(gate);
        let removed = Gate::remove(&world.pins.options(attach));
        assert!(removed.errors.is_empty(), "{:?}", removed.errors);
        assert_eq!(removed.removed.len(), 5, "{:?}", removed.removed);
        assert_eq!(world.hanging_on(&["shroud0"]), Vec::<String>::new());
    }
}

#[test]
fn foreign_programs_are_left_alone() {
    for attach in every_means() {
        let world = World::new();
        let mut foreign = Foreign::new();
        run(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
        run(&[
            "tc",
            "filter",
            "add",
            "dev",
            "eth0",
            "egress",
            "prio",
            "1",
            "handle",
            "7",
            "bpf",
            "da",
            "object-pinned",
            &foreign.path,
        ]);
        run(&[
            "tc", "filter", "add", "dev", "eth0", "egress", "prio", "5", "protocol", "ip", "u32", "match", "u32", "0",
            "0", "classid", "1:1",
        ]);
        if has_tcx() {
            foreign.attach_tcx("eth0");
        }
        let before = (world.hanging(), run(&["tc", "filter", "show", "dev", "eth0", "egress"]));
        let mut gate = world.open(attach);

        reconcile(&mut gate, &desired());
        assert_eq!(world.hanging().len(), before.0.len() + 3);
        drop(gate);
        let removed = Gate::remove(&world.pins.options(attach));

        assert!(removed.errors.is_empty(), "{:?}", removed.errors);
        assert_eq!(
            (world.hanging(), run(&["tc", "filter", "show", "dev", "eth0", "egress"])),
            before
        );
    }
}

/// Ours must come first, or a foreign program that accepts a packet has it leave unseen.
#[test]
fn ours_comes_before_a_foreign_program_that_was_there_first() {
    if !needs_tcx("ours_comes_before_a_foreign_program_that_was_there_first") {
        return;
    }
    let world = World::new();
    let mut foreign = Foreign::new();
    foreign.attach_tcx("eth0");

    reconcile(&mut world.open(Attach::Tcx), &desired());

    let egress: Vec<String> = world
        .hanging()
        .into_iter()
        .filter(|line| line.contains("egress"))
        .collect();
    assert_eq!(egress, ["eth0 tcx/egress shroud_egress", "eth0 tcx/egress shroud_pod"]);
}

#[test]
fn cleanup_leaves_nothing_and_a_second_one_finds_nothing() {
    for attach in every_means() {
        let world = World::new();
        let mut gate = world.open(attach);
        reconcile(&mut gate, &desired());
        drop(gate);

        let removed = Gate::remove(&world.pins.options(attach));

        assert!(removed.errors.is_empty(), "{:?}", removed.errors);
        assert_eq!(removed.removed.len(), 4, "{:?}", removed.removed);
        assert_eq!(world.hanging(), Vec::<String>::new());
        assert!(!world.pins.0.exists());
        let again = Gate::remove(&world.pins.options(attach));
        assert!(again.removed.is_empty() && again.errors.is_empty(), "{again:?}");
    }
}

#[test]
fn a_dotted_device_name_is_a_device_name() {
    if !needs_tcx("a_dotted_device_name_is_a_device_name") {
        return;
    }
    let world = World::new();
    run(&["ip", "link", "set", "eth0", "name", "eth0.100"]);
    let mut gate = world.open(Attach::Tcx);

    reconcile(
        &mut gate,
        &Desired {
            uplinks: ["eth0.100".to_owned()].into(),
            ..desired()
        },
    );

    let attachment = Attachment {
        device: "eth0.100".to_owned(),
        hook: Hook::Egress,
        mechanism: Mechanism::Tcx,
    };
    assert_eq!(
        gate.observe().unwrap().attachments.get(&attachment),
        Some(&Build::Current)
    );
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let world = World::new();
    let mut gate = world.open(Attach::Auto);
    let attachment = Attachment {
        device: "eth9".to_owned(),
        hook: Hook::Egress,
        mechanism: Mechanism::Tcx,
    };

    let error = gate.apply(&Change::Attach { attachment, old: None }).unwrap_err();

    assert_eq!(error.to_string(), "attach to eth9: there is no such device");
}

#[test]
fn a_directory_that_would_not_last_is_refused() {
    let options = shroud_ebpf::Options {
        pin_directory: "/tmp/shroud-gate-test".into(),
        attach: Attach::Auto,
    };

    let error = Gate::open(&options).err().unwrap();

    assert!(error.to_string().contains("not on a BPF file system"), "{error}");
}

fn desired() -> Desired {
    Desired {
        uplinks: ["eth0".to_owned()].into(),
        pod_devices: ["pod0".to_owned()].into(),
        encryption: [].into(),
        table: table(Mode::Enforce),
    }
}

/// A namespace with an uplink and a pod's device.
struct World {
    pins: PinDirectory,
    _namespace: Namespace,
}

impl World {
    fn new() -> Self {
        let namespace = Namespace::new();
        run(&["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far0"]);
        run(&["ip", "link", "add", "pod0", "type", "veth", "peer", "name", "far1"]);
        Self {
            pins: PinDirectory::new(),
            _namespace: namespace,
        }
    }

    fn open(&self, attach: Attach) -> Gate {
        Gate::open(&self.pins.options(attach)).unwrap_or_else(|error| panic!("{error}"))
    }

    /// What hangs on the uplink and the pod's device, as "device hook program", in the order in which programs run.
    fn link_pins(&self) -> Vec<String> {
        let links = fs::read_dir(self.pins.0.join("v3/links")).into_iter().flatten();
        links
            .map(|link| link.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    fn hanging(&self) -> Vec<String> {
        self.hanging_on(&["eth0", "pod0"])
    }

    fn hanging_on(&self, devices: &[&str]) -> Vec<String> {
        self.programs(devices)
            .into_iter()
            .map(|(place, name, _)| format!("{place} {name}"))
            .collect()
    }

    fn program_ids(&self) -> Vec<u32> {
        let programs = self.programs(&["eth0", "pod0"]);
        programs.into_iter().map(|(_, _, id)| id).collect()
    }

    fn programs(&self, devices: &[&str]) -> Vec<(String, String, u32)> {
        let mut found = Vec::new();
        for &device in devices {
            for (side, kind) in [("egress", TcAttachType::Egress), ("ingress", TcAttachType::Ingress)] {
                let programs = if has_tcx() {
                    SchedClassifier::query_tcx(device, kind).unwrap().1
                } else {
                    Vec::new()
                };
                let place = format!("{device} tcx/{side}");
                found.extend(
                    programs
                        .iter()
                        .map(|info| (place.clone(), info.name_as_str().unwrap().to_owned(), info.id())),
                );
                let place = format!("{device} clsact/{side}");
                found.extend(
                    filters(device, side)
                        .into_iter()
                        .map(|(name, id)| (place.clone(), name, id)),
                );
            }
        }
        found
    }
}

/// Name and program of each BPF filter, from lines such as
/// `filter protocol all pref 1 bpf chain 0 handle 0x53480001 shroud_egress direct-action not_in_hw id 12 name shroud_egress tag …`.
fn filters(device: &str, side: &str) -> Vec<(String, u32)> {
    let listed = run(&["tc", "filter", "show", "dev", device, side]);
    let after = |line: &str, word: &str| {
        let mut words = line.split_whitespace().skip_while(|found| *found != word);
        words.nth(1).map(str::to_owned)
    };
    listed
        .lines()
        .filter(|line| line.contains(" bpf ") && line.contains(" handle "))
        .map(|line| {
            (
                after(line, "name").unwrap(),
                after(line, "id").unwrap().parse().unwrap(),
            )
        })
        .collect()
}

/// A program that is not ours: not our pin, not our link.
struct Foreign {
    program: SchedClassifier,
    path: String,
    _pins: PinDirectory,
}

impl Foreign {
    fn new() -> Self {
        let pins = PinDirectory::new();
        drop(Gate::open(&pins.options(Attach::Auto)).unwrap());
        let build = fs::read_dir(pins.0.join("v3/programs"))
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        let path = build.join("shroud_pod");
        let program = SchedClassifier::from_pin(&path).unwrap();
        Self {
            program,
            path: path.to_str().unwrap().to_owned(),
            _pins: pins,
        }
    }

    fn attach_tcx(&mut self, device: &str) {
        let options = TcAttachOptions::TcxOrder(LinkOrder::last());
        self.program
            .attach_with_options(device, TcAttachType::Egress, options)
            .unwrap();
    }
}
