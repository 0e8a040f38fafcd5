#![allow(clippy::all, clippy::unwrap_used)]
use bytes::Bytes;
use clawpot_agent_client::AgentClient;
use clawpot_core::MachineId;
use clawpot_core::exec::*;
use clawpot_core::ports::{Guest, GuestEndpoint};
use clawpot_types::*;
use futures_util::StreamExt;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

async fn run(
    c: &AgentClient,
    id: &MachineId,
    e: &GuestEndpoint,
    n: u64,
    argv: &[&str],
    user: &str,
) -> (String, Duration, u64, Option<ExecEnd>) {
    let (tx, rx) = mpsc::channel(8);
    let eid: ExecId = format!("{:016}", n).parse().unwrap();
    let t = Instant::now();
    tx.send(ExecInput::Start(ExecStart {
        id: eid,
        argv: argv.iter().map(|a| Bytes::copy_from_slice(a.as_bytes())).collect(),
        env: vec![],
        cwd: String::new(),
        user: user.into(),
        timeout: Millis(20000),
        stdin: false,
        tty: None,
    }))
    .await
    .unwrap();
    let mut out = c.exec(id, e, Box::pin(ReceiverStream::new(rx))).await.unwrap();
    let mut text = String::new();
    let mut us = 0;
    let mut end = None;
    let (mut so, mut se) = (0, 0);
    while let Some(f) = out.next().await {
        match f.unwrap() {
            ExecOutput::Stdout { data, .. } => {
                so += data.len() as u64;
                text += &String::from_utf8_lossy(&data)
            }
            ExecOutput::Stderr { data, .. } => {
                se += data.len() as u64;
                text += &String::from_utf8_lossy(&data)
            }
            ExecOutput::Exited(x) => {
                us = x.spawn_to_exit_us;
                end = Some(x.end);
                break;
            }
            ExecOutput::Failed { reason, message } => {
                text += &format!("{reason:?} {message}");
                break;
            }
            _ => {}
        }
        tx.send(ExecInput::Ack { stdout: so, stderr: se }).await.ok();
    }
    let d = t.elapsed();
    tx.send(ExecInput::Ack { stdout: so, stderr: se }).await.ok();
    (text, d, us, end)
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    let netns = "/run/netns/agentlab";
    let e = GuestEndpoint::Tcp { netns: netns.into(), address: "172.31.254.2:10051".parse().unwrap() };
    let id = MachineId { vm: "abcdefgh01234567".parse().unwrap(), incarnation: Incarnation(1) };
    let c = AgentClient::new();
    let t = Instant::now();
    loop {
        match c.hello(&id, &e).await {
            Ok(h) => {
                println!("hello after {:?}: {h:?}", t.elapsed());
                break;
            }
            Err(x) => {
                if t.elapsed() > Duration::from_secs(30) {
                    panic!("{}", x.chain())
                }
                tokio::time::sleep(Duration::from_millis(50)).await
            }
        }
    }
    let t = Instant::now();
    c.hello(&id, &e).await.unwrap();
    println!("second hello {:?}", t.elapsed());
    let base = std::process::id() as u64 * 1000000;
    match args.get(1).map(String::as_str) {
        Some("bench") => {
            for (name, argv) in [("true", &["/bin/true"][..]), ("sh -c echo", &["/bin/sh", "-c", "echo hi"][..])] {
                let mut v = vec![];
                let mut g = vec![];
                for i in 0..60 {
                    let (_, d, us, _) =
                        run(&c, &id, &e, base + i + if name == "true" { 0 } else { 1000 }, argv, "").await;
                    v.push(d);
                    g.push(us)
                }
                v.sort();
                g.sort();
                println!("{name}: round trip p50 {:?} p90 {:?}; guest p50 {} us p90 {}", v[30], v[54], g[30], g[54]);
            }
            let mut v = vec![];
            for _ in 0..60 {
                let t = Instant::now();
                c.hello(&id, &e).await.unwrap();
                v.push(t.elapsed())
            }
            v.sort();
            println!("hello p50 {:?} p90 {:?}", v[30], v[54]);
        }
        Some("stop") => {
            c.shutdown(&id, &e, Millis(2000)).await.unwrap();
            println!("asked")
        }
        Some("out") => {
            let (s, d, _, end) = run(&c, &id, &e, base, &["head", "-c", "33554432", "/dev/zero"], "").await;
            println!("{} MiB in {d:?} {end:?}", s.len() >> 20)
        }
        Some(_) => {
            let v: Vec<&str> = args[1..].iter().map(String::as_str).collect();
            let (s, d, us, end) = run(&c, &id, &e, base, &v, &std::env::var("AS").unwrap_or_default()).await;
            println!("{s}--- {d:?} guest {us} us {end:?}")
        }
        None => {}
    }
}
