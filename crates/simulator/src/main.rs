//! `simulate`: many seeds, each a run; or one seed again, with its trace.
//!
//! ```text
//! simulate [--operations N] [--each N] [--from SEED] [--threads N] [--all-failpoints]
//! simulate --seed SEED [--each N]          one run; prints its whole trace
//! ```
//! Every tenth seed is run twice and has to give the same trace. A seed that fails is shrunk to fewer operations and told with
//! the command that replays it.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use clawpot_simulator::weather::{Commit, Failpoint, commits, failpoints};
use clawpot_simulator::{Report, Setup, run};
use clawpot_testkit::Method;

/// Lines of a failed run's trace that are printed.
const TAIL: usize = 80;
/// Of so many seeds one is run twice.
const TWICE: u64 = 10;

#[derive(Clone, Debug)]
struct Arguments {
    operations: u64,
    /// Operations of one run.
    each: u64,
    from: u64,
    seed: Option<u64>,
    threads: u64,
    all_failpoints: bool,
}

fn arguments() -> Result<Arguments, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut known = Arguments {
        operations: 20_000,
        each: 240,
        from: 0,
        seed: None,
        threads: u64::try_from(threads).unwrap_or(1),
        all_failpoints: false,
    };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        if name == "--all-failpoints" {
            known.all_failpoints = true;
            continue;
        }
        let value = given.next().ok_or_else(|| format!("{name}: a number is missing"))?;
        let number: u64 = value.replace('_', "").parse().map_err(|error| format!("{name} {value}: {error}"))?;
        match name.as_str() {
            "--operations" => known.operations = number,
            "--each" => known.each = number.max(1),
            "--from" => known.from = number,
            "--seed" => known.seed = Some(number),
            "--threads" => known.threads = number.max(1),
            _ => return Err(format!("{name}: not known")),
        }
    }
    Ok(known)
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    match arguments.seed {
        Some(seed) => replay(seed, arguments.each),
        None => many(&arguments),
    }
}

fn replay(seed: u64, each: u64) -> ExitCode {
    let mut setup = Setup::new(seed, each);
    setup.whole_trace = true;
    let report = simulated(&setup);
    report.trace.iter().for_each(|line| println!("{line}"));
    println!("seed {seed}: trace {:016x}, {} operations, {} calls", report.hash, report.operations, report.calls);
    match report.wrong {
        Some(wrong) => {
            println!("WRONG: {wrong}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}

/// A run whose runtime cannot even be made is told as any other failure.
fn simulated(setup: &Setup) -> Report {
    run(setup).unwrap_or_else(|error| {
        eprintln!("error: the runtime cannot be made: {error}");
        std::process::exit(1)
    })
}

/// Sums over all runs.
#[derive(Debug, Default)]
struct Sum {
    runs: u64,
    operations: u64,
    calls: u64,
    crashes: u64,
    vms: u64,
    volumes: u64,
    deletes_checked: u64,
    quarantined: u64,
    reached: BTreeMap<(Method, Failpoint), u64>,
    reached_commits: BTreeMap<(Commit, Failpoint), u64>,
}

impl Sum {
    fn add(&mut self, report: &Report) {
        self.runs += 1;
        self.operations += report.operations;
        self.calls += report.calls;
        self.crashes += report.crashes;
        self.vms += report.vms;
        self.volumes += report.volumes;
        self.deletes_checked += report.deletes_checked;
        self.quarantined += report.quarantined;
        for (at, count) in &report.reached {
            *self.reached.entry(*at).or_default() += count;
        }
        for (at, count) in &report.reached_commits {
            *self.reached_commits.entry(*at).or_default() += count;
        }
    }
}

fn many(arguments: &Arguments) -> ExitCode {
    let begun = Instant::now();
    let next = AtomicU64::new(arguments.from);
    let done = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let sum = Mutex::new(Sum::default());
    let work = || {
        while done.load(Ordering::SeqCst) < arguments.operations && !failed.load(Ordering::SeqCst) {
            let seed = next.fetch_add(1, Ordering::SeqCst);
            let report = simulated(&Setup::new(seed, arguments.each));
            done.fetch_add(report.operations, Ordering::SeqCst);
            if let Some(wrong) = wrong(&report, arguments.each) {
                failed.store(true, Ordering::SeqCst);
                tell(&wrong, arguments.each);
            }
            sum.lock().unwrap_or_else(PoisonError::into_inner).add(&report);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads {
            scope.spawn(work);
        }
    });
    let sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    let all = failpoints();
    let missed: Vec<_> = all.iter().filter(|at| !sum.reached.contains_key(at)).collect();
    let own = commits();
    let missed_commits: Vec<_> = own.iter().filter(|at| !sum.reached_commits.contains_key(at)).collect();
    println!(
        "{} operations in {} runs from seed {}: {} VMs, {} volumes, {} calls of ports, {} crashes, {} faults at {} of {} failpoints and {} of {} of \
         policy, admission, quarantine and volumes, \
         {} deletes held to 100 ms, {} quarantines, {:.1} s",
        sum.operations,
        sum.runs,
        arguments.from,
        sum.vms,
        sum.volumes,
        sum.calls,
        sum.crashes,
        sum.reached.values().sum::<u64>(),
        all.len() - missed.len(),
        all.len(),
        own.len() - missed_commits.len(),
        own.len(),
        sum.deletes_checked,
        sum.quarantined,
        begun.elapsed().as_secs_f64()
    );
    if arguments.all_failpoints && !(missed.is_empty() && missed_commits.is_empty()) {
        println!("never reached: {missed:?} {missed_commits:?}");
        return ExitCode::FAILURE;
    }
    if failed.into_inner() {
        return ExitCode::FAILURE;
    }
    println!("nothing lost, nothing leaked");
    ExitCode::SUCCESS
}

/// The failed run, or one that shows that the same seed gives another trace.
fn wrong(report: &Report, each: u64) -> Option<Report> {
    if report.wrong.is_some() {
        return Some(simulated(&Setup::new(report.seed, each)));
    }
    if !report.seed.is_multiple_of(TWICE) {
        return None;
    }
    let mut again = simulated(&Setup::new(report.seed, each));
    (again.hash != report.hash).then(|| {
        again.wrong = Some(format!("the same seed gave trace {:016x} and {:016x}", report.hash, again.hash));
        again
    })
}

/// Says what was wrong, with as few operations as it takes.
fn tell(report: &Report, each: u64) {
    let (mut least, mut shown) = (each, None);
    let mut fewer = 1;
    // By doubling: the runs are short, and their number of operations is a prefix of the longer ones'.
    while fewer < each {
        let shorter = simulated(&Setup::new(report.seed, fewer));
        if shorter.wrong.is_some() {
            (least, shown) = (fewer, Some(shorter));
            break;
        }
        fewer = (fewer * 5).div_ceil(4);
    }
    let report = shown.as_ref().unwrap_or(report);
    let tail = report.trace.len().saturating_sub(TAIL);
    println!("the end of seed {}:", report.seed);
    report.trace[tail..].iter().for_each(|line| println!("{line}"));
    println!("seed {}: {}", report.seed, report.wrong.as_deref().unwrap_or("wrong the first time, and not again"));
    println!("replay: cargo run --profile sim -p clawpot-simulator -- --seed {} --each {least}", report.seed);
}
