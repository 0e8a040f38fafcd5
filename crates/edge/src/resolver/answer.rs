//! One query, from bytes to bytes.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{DNSClass, RecordType};
use hickory_resolver::net::{DnsError, NetError};

use super::upstream::Upstream;

/// Of a header; shorter is no DNS.
const HEADER: usize = 12;

/// What fits every path without being cut into fragments (DNS flag day 2020), and what a guest without EDNS expects.
const UDP_WITH_EDNS: u16 = 1232;
const UDP_PLAIN: u16 = 512;

/// How the question came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Udp,
    Tcp,
}

/// `None`: not a question; whoever sent it hears nothing.
pub(super) async fn answer(upstream: &Upstream, question: &[u8], way: Way) -> Option<Vec<u8>> {
    let query = match Message::from_vec(question) {
        Ok(query) => query,
        Err(_) => return malformed(question),
    };
    if query.metadata.message_type != MessageType::Query {
        return None;
    }
    let mut reply = begin(&query);
    match refusal(&query) {
        Some(code) => reply.metadata.response_code = code,
        None => ask(upstream, &query, &mut reply).await,
    }
    finish(reply, &query, way)
}

/// Says so, when at least the number of the question can be made out.
fn malformed(question: &[u8]) -> Option<Vec<u8>> {
    let [a, b, flags, ..] = *question else { return None };
    let is_query = flags & 0x80 == 0;
    let id = u16::from_be_bytes([a, b]);
    let reply = || Message::error_msg(id, OpCode::Query, ResponseCode::FormErr).to_vec().ok();
    (question.len() >= HEADER && is_query).then(reply).flatten()
}

fn begin(query: &Message) -> Message {
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.checking_disabled = query.metadata.checking_disabled;
    reply.add_queries(query.queries.iter().cloned());
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_WITH_EDNS).set_version(0);
        reply.set_edns(edns);
    }
    reply
}

/// What is not asked of anybody: more or less than one question, other classes, zone transfers and "everything".
fn refusal(query: &Message) -> Option<ResponseCode> {
    if query.metadata.op_code != OpCode::Query {
        return Some(ResponseCode::NotImp);
    }
    let [question] = &query.queries[..] else { return Some(ResponseCode::FormErr) };
    let unasked = [RecordType::AXFR, RecordType::IXFR, RecordType::ANY, RecordType::OPT, RecordType::TSIG];
    (question.query_class() != DNSClass::IN || unasked.contains(&question.query_type())).then_some(ResponseCode::NotImp)
}

async fn ask(upstream: &Upstream, query: &Message, reply: &mut Message) {
    let Some(question) = query.queries.first() else { return };
    let mut name = question.name().clone();
    // Names on the wire are whole; nothing is searched for.
    name.set_fqdn(true);
    match upstream.lookup(name, question.query_type()).await {
        Ok(found) => {
            reply.add_answers(found.answers().iter().cloned());
        }
        Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
            reply.metadata.response_code = none.response_code;
            // Tells the guest for how long there is nothing.
            if let Some(soa) = none.soa {
                reply.add_authority((*soa).into_record_of_rdata());
            }
        }
        Err(NetError::Dns(DnsError::ResponseCode(code))) => reply.metadata.response_code = code,
        Err(error) => {
            tracing::debug!(name = %question.name(), kind = %question.query_type(), %error, "nobody answers");
            reply.metadata.response_code = ResponseCode::ServFail;
        }
    }
}

/// What is too long for UDP is cut to nothing and marked: the guest asks again by TCP.
fn finish(reply: Message, query: &Message, way: Way) -> Option<Vec<u8>> {
    let room = match (way, &query.edns) {
        (Way::Tcp, _) => u16::MAX,
        (Way::Udp, Some(edns)) => edns.max_payload().clamp(UDP_PLAIN, UDP_WITH_EDNS),
        (Way::Udp, None) => UDP_PLAIN,
    };
    let bytes = reply.to_vec().ok()?;
    if bytes.len() <= usize::from(room) {
        return Some(bytes);
    }
    reply.truncate().to_vec().ok().filter(|bytes| bytes.len() <= usize::from(room))
}
