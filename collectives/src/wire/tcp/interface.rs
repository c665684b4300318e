//! Which of its addresses a rank offers to ranks of other hosts, where `PILLION_INTERFACE` says so.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netdevice};

use crate::launch::INTERFACE;
use crate::limits::explain;

/// Bytes of a netlink message's header, and of what follows it in a message about an address.
const HEADER: usize = 16;
const ABOUT: usize = 8;

/// An address of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Address {
    interface: String,
    ip: IpAddr,
}

/// The addresses that `wish` stands for: those of an interface, or one address.
///
/// # Errors
/// Lists the interfaces of this host, where none has this name or address.
pub(super) fn find(wish: &str) -> Result<Vec<IpAddr>, String> {
    let all =
        addresses().map_err(|errno| format!("cannot list the addresses of this host: {}", explain(&errno.into())))?;
    let ip: Option<IpAddr> = wish.parse().ok();
    let is_meant = |address: &&Address| ip.map_or(address.interface == wish, |ip| address.ip == ip.to_canonical());
    let found: Vec<IpAddr> = all.iter().filter(is_meant).map(|address| address.ip).collect();
    if found.is_empty() {
        return Err(format!(
            "{INTERFACE} is {wish:?}, but no interface of this host has this name or address, and one that other hosts \
             can use: choose one of {}",
            list(&all)
        ));
    }
    Ok(found)
}

/// The address of `found` by which a rank offers itself, where rank 0 is reached at `zero`: the
/// first of the same family, or else the first.
///
/// # Errors
/// For an address of the loopback interface, which means another host to every host.
pub(super) fn choose(found: &[IpAddr], zero: IpAddr) -> Result<IpAddr, String> {
    let alike = found.iter().find(|ip| ip.is_ipv4() == zero.is_ipv4());
    match alike.or(found.first()) {
        Some(ip) if ip.is_loopback() && !zero.is_loopback() => Err(format!(
            "{INTERFACE} stands for {ip}, which other hosts cannot reach, but rank 0 is at {zero}: choose another \
             interface, or unset {INTERFACE}"
        )),
        Some(ip) => Ok(*ip),
        None => Err(format!("{INTERFACE} stands for no address")),
    }
}

/// The address from which this host reaches `zero`, or, where that is not known, the hosts beyond
/// its router. Nothing is sent.
pub(super) fn source(zero: Option<IpAddr>) -> IpAddr {
    // Addresses for documentation, which no host has.
    let beyond = [IpAddr::from([192, 0, 2, 1]), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()];
    let from = |to: IpAddr| {
        let any = if to.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        // The kernel chooses the route, and with it the address.
        socket.connect((to, 9)).ok()?;
        socket.local_addr().ok().map(|address| address.ip())
    };
    let routed = zero.into_iter().chain(beyond).find_map(from);
    let any = || addresses().ok()?.into_iter().map(|address| address.ip).find(|ip| !ip.is_loopback());
    routed.or_else(any).unwrap_or(Ipv4Addr::LOCALHOST.into())
}

/// `eth0 (10.0.0.1, fd00::1) or lo (127.0.0.1)`.
fn list(all: &[Address]) -> String {
    let mut names: Vec<&str> = all.iter().map(|address| address.interface.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let of = |name: &&str| {
        let own = all.iter().filter(|address| address.interface == **name).map(|address| address.ip.to_string());
        format!("{name} ({})", own.collect::<Vec<String>>().join(", "))
    };
    match &names.iter().map(of).collect::<Vec<String>>()[..] {
        [] => "none, since this host has no address".to_owned(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

/// The addresses of this host that mean the same on other hosts, as the kernel lists them. Those of
/// IPv6 that hold on one link alone would need the number of the other host's interface.
fn addresses() -> Result<Vec<Address>, Errno> {
    // The protocol of this family with the number 0 is that of routes, interfaces and addresses.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    let request = [
        &((HEADER + ABOUT) as u32).to_ne_bytes()[..],
        &libc::RTM_GETADDR.to_ne_bytes(),
        &((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes(),
        &[0; 8 + ABOUT],
    ];
    rustix::net::send(&socket, &request.concat(), SendFlags::empty())?;
    let (mut found, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        let (_, bytes) = rustix::io::retry_on_intr(|| rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty()))?;
        let mut rest = &buffer[..bytes];
        if rest.is_empty() {
            return Err(Errno::IO);
        }
        while let Some((kind, body, after)) = message(rest) {
            rest = after;
            match i32::from(kind) {
                libc::NLMSG_DONE => return Ok(found),
                // A number below zero, which is an errno.
                libc::NLMSG_ERROR => {
                    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return Err(Errno::from_raw_os_error(
                        code.checked_neg().filter(|&code| code > 0).unwrap_or(libc::EIO),
                    ));
                }
                _ if kind == libc::RTM_NEWADDR => {
                    let Some((index, ip)) = address(body) else { continue };
                    // The interface may have gone meanwhile.
                    if let Ok(interface) = netdevice::index_to_name(&socket, index) {
                        found.push(Address { interface, ip });
                    }
                }
                _ => {}
            }
        }
    }
}

/// The kind of the first message, what it says, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER..len)?;
    Some((kind, body, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// The number of an interface and its address, from the body of a message.
fn address(body: &[u8]) -> Option<(u32, IpAddr)> {
    let index = u32::from_ne_bytes(*body.get(4..)?.first_chunk()?);
    let (mut rest, mut found) = (body.get(ABOUT..)?, None);
    while let Some(len) = rest.first_chunk().map(|len| usize::from(u16::from_ne_bytes(*len))) {
        let (Some(kind), Some(value)) = (rest.get(2..).and_then(|rest| rest.first_chunk()), rest.get(4..len)) else {
            break;
        };
        let ip = match *value {
            [a, b, c, d] => Some(IpAddr::from(Ipv4Addr::new(a, b, c, d))),
            _ => value.try_into().ok().map(|octets: [u8; 16]| IpAddr::from(Ipv6Addr::from(octets))),
        };
        match u16::from_ne_bytes(*kind) {
            // With a point-to-point link, that of the other side is there as well.
            libc::IFA_LOCAL => found = ip,
            libc::IFA_ADDRESS => found = found.or(ip),
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    let is_of_link = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    found.filter(|ip| !is_of_link(ip)).map(|ip| (index, ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_found_by_name_and_by_address() {
        let here = IpAddr::from([127, 0, 0, 1]);
        assert!(find("lo").unwrap().contains(&here));
        assert_eq!(find("127.0.0.1"), Ok(vec![here]));
        for wish in ["nonsense", "", "192.0.2.1", "lo:", "ff02::1"] {
            let error = find(wish).unwrap_err();
            assert!(error.contains(&format!("PILLION_INTERFACE is {wish:?}")), "{error}");
            assert!(error.contains("choose one of ") && error.contains("lo (127.0.0.1"), "{error}");
        }
    }

    #[test]
    fn an_address_of_the_family_by_which_rank_0_is_reached_is_offered() {
        let [v4, v6, zero] = ["10.0.0.1", "fd00::1", "10.0.0.9"].map(|text| text.parse::<IpAddr>().unwrap());
        assert_eq!(choose(&[v6, v4], zero), Ok(v4));
        assert_eq!(choose(&[v4, v6], "fd00::9".parse().unwrap()), Ok(v6));
        assert_eq!(choose(&[v6], zero), Ok(v6));
        let here = IpAddr::from([127, 0, 0, 1]);
        assert_eq!(choose(&[here], here), Ok(here));
        assert!(choose(&[here], zero).unwrap_err().contains("127.0.0.1, which other hosts cannot reach"));
    }

    #[test]
    fn what_the_kernel_says_is_read_whatever_it_is() {
        let part = |kind: u16, value: &[u8]| {
            [&(4 + value.len() as u16).to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
        };
        let about = [&[2, 8, 0, 0][..], &7u32.to_ne_bytes()].concat();
        let link =
            [&about[..], &part(libc::IFA_ADDRESS, &[10, 0, 0, 2]), &part(libc::IFA_LOCAL, &[10, 0, 0, 1])].concat();
        assert_eq!(address(&link), Some((7, [10, 0, 0, 1].into())));
        let of_link = [&about[..], &part(libc::IFA_ADDRESS, &"fe80::1".parse::<Ipv6Addr>().unwrap().octets())].concat();
        assert_eq!(address(&of_link), None);
        for end in 0..link.len() {
            // No part of a message is read past its end, or again and again.
            address(&link[..end]);
            message(&link[..end]);
        }
        assert_eq!(address(&[&about[..], &[0; 8]].concat()), None);
    }
}
